"""Inline PTX."""

from cutlass._mlir.dialects import llvm


def asm(result, num_results: int, operands, text: str, constraints: str, side_effects: bool) -> list:
    """Inline PTX with `num_results` results of one IR type."""
    kwargs = {"has_side_effects": side_effects, "is_align_stack": False, "asm_dialect": llvm.AsmDialect.AD_ATT}
    values = [x.ir_value() for x in operands]
    if num_results == 0:
        llvm.inline_asm(None, values, text, constraints, **kwargs)
        return []
    if num_results == 1:
        return [llvm.inline_asm(result, values, text, constraints, **kwargs)]
    pack = llvm.inline_asm(llvm.StructType.get_literal([result] * num_results), values, text, constraints, **kwargs)
    return [llvm.extractvalue(result, pack, [i]) for i in range(num_results)]
