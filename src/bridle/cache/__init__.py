"""Every picture and caption encoded once, kept on disk, read by memory map.

Read in this order: `encode` (what an encoder is), `fingerprint` (when a cache is still good), `index` (what the folder
holds), `shards` (writing), `build` (all of it), `store` (reading).
"""
