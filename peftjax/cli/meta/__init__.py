"""What `peftjax meta` does: few-shot tasks of texts, ways of adapting to them, what is learned."""
