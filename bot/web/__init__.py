"""The HTTP side of the service: the webhook and its pages on one listener, metrics and health on another."""
