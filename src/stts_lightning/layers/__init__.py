"""What tokens go through, at the pace of the machine: products, linear layers, the perceptron, attention, pooling."""
