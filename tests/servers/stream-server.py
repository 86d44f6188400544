#!/usr/bin/env python3
"""A simplestreams server for the tests: serves a directory over https on a loopback port until it is ended.

stream-server.py DIRECTORY CERTIFICATE KEY PORT-FILE

What lies below DIRECTORY is served as it is; a file NAME.cut beside NAME lets the answer end after so many bytes, with the
length of the whole announced, NAME.moved sends elsewhere.
"""
import http.server
import os
import ssl
import sys

root, certificate, key, port_file = sys.argv[1:5]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = os.path.realpath(os.path.join(root, self.path.split("?")[0].lstrip("/")))
        if not path.startswith(os.path.realpath(root) + "/"):
            return self.send_error(403)
        if os.path.exists(path + ".moved"):
            self.send_response(302)
            self.send_header("Location", open(path + ".moved").read().strip())
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if not os.path.isfile(path):
            return self.send_error(404)
        data = open(path, "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if os.path.exists(path + ".cut"):
            data = data[: int(open(path + ".cut").read())]
            self.close_connection = True
        self.wfile.write(data)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True)
with open(port_file + ".new", "w") as f:
    f.write(str(server.server_address[1]))
os.rename(port_file + ".new", port_file)
server.serve_forever()
