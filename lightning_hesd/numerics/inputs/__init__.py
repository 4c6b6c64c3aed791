"""What an analysis is made from: batches, parameters, blocks of layers, options."""
