"""Model providers: an ordered chain of OpenAI-compatible endpoints whose health all workers share."""
