"""The machines of a round and of key epochs where messages are requests and replies.

For engines in which the coordinator asks and a site's process lives for one request: the site's machines are
written into a memory after each request and read from it at the next (decision 0023). `terms.py`: what a run
agrees on, and its sums; `site.py` and `coordinator.py`: the two roles; `requests.py`: what travels. None of them
knows the engine.
"""
