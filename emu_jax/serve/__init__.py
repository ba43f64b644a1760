"""The server: a web page, and OpenAI-compatible endpoints.

app.py          routes, and the path of a request to the model and back
middleware.py   hosts, API keys, limits of clients, request ids, headers
connections.py  sockets, timeouts and limits on connections
requests.py     validation of a request, before anything is computed
openai.py       requests and answers of the OpenAI-compatible endpoints
metrics.py      counters in Prometheus' format
worker.py       the thread that owns the model, and its queue
page/           the page itself: HTML, CSS and JavaScript
"""
