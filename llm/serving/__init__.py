"""Chat with a trained model: in the browser, in the terminal, one answer."""
