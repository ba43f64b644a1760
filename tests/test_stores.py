"""The emulated object stores of the other tests (tests/stores.py): what their faults do."""

import urllib.error
import urllib.request


def status(store, method: str = "GET", query: str = "", content: bytes | None = None) -> int:
    """Status of a request for one object."""
    path = store.folder.partition("://")[2] + "/a"
    if store.scheme == "gs":
        bucket, _, name = path.partition("/")
        upload = f"upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}&{query}"
        path = upload if method == "POST" else f"storage/v1/b/{bucket}/o/{name.replace('/', '%2F')}"
    credential = "AWS4-HMAC-SHA256 Credential=a/20000101/us-east-1/s3/aws4_request, Signature=b"
    headers = {"Authorization": credential}
    request = urllib.request.Request(f"{store.address}/{path}", content, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_faults(store):
    put = "POST" if store.scheme == "gs" else "PUT"
    assert status(store) == 404
    assert status(store, put, content=b"x") == status(store) == 200
    store.deny(f"{store.folder}/a", put)
    assert (status(store, put, content=b"x"), status(store)) == (403, 200)
    store.deny(store.folder)
    assert status(store) == 403
    store.refuse(60)
    assert status(store) == 503
    name = store.folder.partition("tests/")[2] + "/a"
    assert store.requests[-2:] == [("GET", name)] * 2


def test_preconditions_of_gcs(gcs):
    first = "ifGenerationMatch=0"
    assert status(gcs, "POST", first, b"x") == 200
    assert status(gcs, "POST", first, b"y") == 412
    assert status(gcs, "POST", "ifGenerationMatch=17", b"y") == 412
