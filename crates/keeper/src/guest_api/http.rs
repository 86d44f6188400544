//! As much of HTTP/1.1 as clients of the guest API use: requests with a length, answers with a length, one after the other
//! on a connection. Everything is bounded. RFC 9112.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

/// Largest head of a request.
const HEAD: usize = 16 << 10;
/// Largest body.
const BODY: usize = 64 << 10;

/// A request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Percent signs decoded, without the query.
    pub(super) path: String,
    pub(super) query: String,
    pub(super) body: Vec<u8>,
    pub(super) keep_alive: bool,
    /// The client's key, when it asks for a websocket.
    pub(super) websocket: Option<String>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    status: u16,
    kind: &'static str,
    body: String,
}

impl Response {
    pub(super) fn json(body: &str) -> Self {
        Self { status: 200, kind: "application/json", body: body.to_owned() }
    }

    pub(super) fn text(body: &str) -> Self {
        Self { status: 200, kind: "text/plain; charset=utf-8", body: body.to_owned() }
    }

    pub(super) fn empty() -> Self {
        Self::text("")
    }

    pub(super) fn error(status: u16, text: &str) -> Self {
        Self { status, ..Self::text(&format!("{text}\n")) }
    }

    pub(super) fn write(&self, to: &mut impl Write, keep: bool) -> std::io::Result<()> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            501 => "Not Implemented",
            _ => "Internal Server Error",
        };
        let head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: {}\r\n\r\n",
            self.status,
            self.kind,
            self.body.len(),
            if keep { "keep-alive" } else { "close" }
        );
        to.write_all(&[head.as_bytes(), self.body.as_bytes()].concat())
    }
}

/// The next request; what came after it stays in `buffer`. None at the end, a refusal for what is no request.
pub(super) fn read(
    from: &mut UnixStream,
    buffer: &mut Vec<u8>,
) -> std::io::Result<Result<Option<Request>, Response>> {
    let mut chunk = [0u8; 4096];
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if buffer.len() > HEAD {
            return Ok(Err(Response::error(431, "the head of the request is too large")));
        }
        match from.read(&mut chunk)? {
            0 => return Ok(Ok(None)),
            n => buffer.extend_from_slice(&chunk[..n]),
        }
    };
    let head: Vec<u8> = buffer.drain(..end).collect();
    let (mut request, length) = match parse(&head) {
        Ok(parsed) => parsed,
        Err(refusal) => return Ok(Err(refusal)),
    };
    while buffer.len() < length {
        match from.read(&mut chunk)? {
            0 => return Ok(Ok(None)),
            n => buffer.extend_from_slice(&chunk[..n]),
        }
    }
    request.body = buffer.drain(..length).collect();
    Ok(Ok(Some(request)))
}

fn parse(head: &[u8]) -> Result<(Request, usize), Response> {
    let bad = || Response::error(400, "this is not a request of HTTP/1.1");
    let text = std::str::from_utf8(head).map_err(|_| bad())?;
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (first.next(), first.next(), first.next(), first.next())
    else {
        return Err(bad());
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if !path.starts_with('/') || !version.starts_with("HTTP/1.") {
        return Err(bad());
    }
    let mut request = Request {
        method: method.to_owned(),
        path: decode(path).ok_or_else(bad)?,
        query: decode(query).ok_or_else(bad)?,
        keep_alive: version == "HTTP/1.1",
        ..Request::default()
    };
    let (mut length, mut upgrade, mut key) = (0usize, false, None);
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(bad)?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().map_err(|_| bad())?,
            "transfer-encoding" => {
                return Err(Response::error(501, "send the body with its length, not in chunks"));
            }
            "connection" if value.eq_ignore_ascii_case("close") => request.keep_alive = false,
            "upgrade" => upgrade = value.eq_ignore_ascii_case("websocket"),
            "sec-websocket-key" => key = Some(value.to_owned()),
            _ => {}
        }
    }
    if length > BODY {
        return Err(Response::error(413, "the body is larger than 64 KiB"));
    }
    request.websocket = key.filter(|_| upgrade);
    Ok((request, length))
}

/// Percent signs decoded; none for what is no text then.
fn decode(text: &str) -> Option<String> {
    let mut out = vec![];
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

/// A string of JSON.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Name and value of an object of JSON with one member, both strings without escapes: all that a guest ever sends.
pub(super) fn only_member(body: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(body).ok()?.trim();
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    let string = |s: &str| {
        let s = s.trim().strip_prefix('"')?.strip_suffix('"')?;
        (!s.contains(['"', '\\'])).then(|| s.to_owned())
    };
    let (name, value) = inner.split_once(':')?;
    Some((string(name)?, string(value)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let (request, length) = parse(
            b"PATCH /1.0/config/user.a%2Fb?type=config HTTP/1.1\r\nHost: lxd\r\ncontent-length: 5\r\n\r\n",
        )
        .unwrap();
        assert_eq!((request.path.as_str(), request.query.as_str()), ("/1.0/config/user.a/b", "type=config"));
        assert!(length == 5 && request.keep_alive && request.websocket.is_none());
        for bad in [
            &b"GET\r\n\r\n"[..],
            b"GET / FTP/1.0\r\n\r\n",
            b"GET /%zz HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nnonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\n\r\n",
        ] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn little_json() {
        assert_eq!(quote("a\"\\\n"), "\"a\\\"\\\\\\u000a\"");
        let member = |text: &str| only_member(text.as_bytes());
        assert_eq!(member(" { \"state\" : \"Ready\" } "), Some(("state".into(), "Ready".into())));
        for bad in ["", "[]", "{}", "{\"a\":1}", "{\"a\":\"b\",\"c\":\"d\"}", "{\"a\":\"\\u0041\"}"] {
            assert_eq!(member(bad), None, "{bad}");
        }
    }
}
