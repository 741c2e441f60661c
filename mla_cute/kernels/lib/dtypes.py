"""Element types of the DSL by the names that static keys have for them."""

from cutlass import BFloat16, Float16

CUTLASS_DTYPES = {"bfloat16": BFloat16, "float16": Float16}
