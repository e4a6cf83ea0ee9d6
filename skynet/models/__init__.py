"""What a model is, whoever runs it: configuration, layers and their costs, how each tensor splits, weight store."""
