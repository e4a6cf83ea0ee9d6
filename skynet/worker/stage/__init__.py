"""One rank's part of a model: weights, KV cache, layers, sampling. Knows tensors and a collective, no sockets."""
