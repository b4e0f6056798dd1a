"""What is done with a trained model, and how a training is launched."""
