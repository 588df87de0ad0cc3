"""peftjax.cli"""
