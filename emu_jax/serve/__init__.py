"""The local web page: chat about images and video, and images from mixed prompts.

app.py          routes, and the path of a request to the model and back
connections.py  sockets, timeouts and limits on connections
requests.py     validation of a request, before anything is computed
worker.py       the thread that owns the model, and its queue
page/           the page itself: HTML, CSS and JavaScript
"""
