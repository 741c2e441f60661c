"""The interfaces of other libraries and engines, over the calls of this one.

Importing a module here needs torch only, but for the backends of engines, which need their engine.

flashinfer        BatchMLAPagedAttentionWrapper, MLAPlanMetadata
flash_mla         get_mla_metadata, flash_mla_with_kvcache, flash_mla_sparse_fwd
vllm, sglang      attention backends, found by the engines through their entry points
vllm_sparse       the same for sparse MLA layers
flashinfer_bench  export: solutions whose source calls this library
"""
