"""Does: agent, stage runtime, collectives, KV cache, sampler."""
