"""peftjax.models"""
