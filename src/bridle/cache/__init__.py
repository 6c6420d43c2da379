"""Every picture and caption encoded once, kept on disk, read as it is needed.

Read in this order: `encode` (what an encoder is), `fingerprint` (when a cache is still good), `index` (what the folder
holds), `shards` (writing), `build` (all of it), `rows` and `store` (reading).
"""
