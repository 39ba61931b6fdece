"""PrefixCache: KV slots and the life of requests over a tree."""
