"""peftjax.methods"""
