"""peftjax.data"""
