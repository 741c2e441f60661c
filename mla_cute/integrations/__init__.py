"""The interfaces of other libraries and engines, over the calls of this one. Importing a module here needs torch only.

flashinfer   BatchMLAPagedAttentionWrapper, MLAPlanMetadata
flash_mla    get_mla_metadata, flash_mla_with_kvcache
"""
