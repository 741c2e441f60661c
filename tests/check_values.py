"""What calls must catch on the CPU, and with MLA_CUTE_CHECK=1 on a GPU.

(entry, argument, position, value written there, argument the error names), for the small case of both test folders:
kv_indptr [0, 2, 2, 3, 6], page ids of 9 pages and 6 block-table columns.
"""

NAMES = ("entry", "name", "position", "value", "named")
BAD_VALUES = [
    ("csr", "kv_indptr", 2, 1, "kv_indptr"),
    ("csr", "kv_indptr", 0, -1, "kv_indptr"),
    ("csr", "kv_indptr", 4, 1000, "kv_indptr"),
    ("csr", "kv_indices", 5, 9, "kv_indices"),
    ("csr", "kv_indices", 0, -1, "kv_indices"),
    ("csr", "kv_last_page_len", 3, 9, "kv_last_page_len"),
    ("block_table", "block_table", (3, 2), 9, "block_table"),
    ("block_table", "block_table", (0, 0), -5, "block_table"),
    ("block_table", "seq_lens", 3, 49, "seq_lens"),
    ("block_table", "seq_lens", 1, -1, "seq_lens"),
    ("block_table", "seq_lens", 2, 9, "block_table"),
]
