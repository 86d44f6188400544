//! Requests: paths taken apart without tricks, queries, bodies of bounded size, and what is left of those that are refused.

use crate::{
    fields::Fields,
    observe::{self, Read},
    respond::Reply,
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::{
    Request,
    body::{Body, Frame, Incoming, SizeHint},
    header::{CONNECTION, EXPECT, HeaderValue},
};
use karst_model::{Error, Result};
use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{self, Poll},
    time::Duration,
};

/// Largest JSON body, in bytes.
pub const JSON_LIMIT: usize = 1 << 20;

/// Takes a path apart into percent-decoded segments.
///
/// # Errors
/// Invalid, for a broken escape, an empty segment, `.`, `..`, or a control character.
pub fn segments(path: &str) -> Result<Vec<String>> {
    let bad = |why: &str| Error::invalid("path", format!("the path of the request {why}"));
    let rest = path.strip_prefix('/').ok_or_else(|| bad("does not begin with /"))?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.is_empty() {
        return Ok(vec![]);
    }
    rest.split('/')
        .map(|segment| {
            let s = decode(segment).ok_or_else(|| bad("has a broken % escape"))?;
            match s.as_str() {
                "" => Err(bad("has an empty segment")),
                "." | ".." => Err(bad("has a . or .. segment")),
                _ if s.chars().any(char::is_control) => Err(bad("has a control character")),
                _ => Ok(s),
            }
        })
        .collect()
}

fn decode(s: &str) -> Option<String> {
    if !s.contains('%') {
        return Some(s.to_owned());
    }
    let mut out = Vec::with_capacity(s.len());
    let mut bytes = s.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let high = (bytes.next()? as char).to_digit(16)?;
            let low = (bytes.next()? as char).to_digit(16)?;
            out.push((high * 16 + low) as u8);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

/// A query, decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Parses the part after `?`.
    ///
    /// # Errors
    /// Invalid, for a broken escape.
    pub fn parse(query: Option<&str>) -> Result<Self> {
        let Some(query) = query else {
            return Ok(Self::default());
        };
        query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
                let both = decode(&k.replace('+', " ")).zip(decode(&v.replace('+', " ")));
                both.ok_or_else(|| Error::invalid("query", "the query of the request has a broken % escape"))
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// First value of `name`, unless absent or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        observe::note(|| Read::Query(name.to_owned()));
        self.0.iter().find(|(k, v)| k == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }

    /// With another pair, which counts before any of the same name.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.insert(0, (name.to_owned(), value.to_owned()));
        self
    }

    /// All pairs, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Is `name` true (`1`, `true`)?
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "true" | "yes" | "on"))
    }

    /// `recursion`: 0, 1 or 2.
    ///
    /// # Errors
    /// Invalid, when it is no number.
    pub fn recursion(&self) -> Result<u8> {
        match self.get("recursion").map(|s| s.split_once(';').map_or(s, |(number, _)| number)) {
            None => Ok(0),
            Some(s) => s
                .parse::<u8>()
                .map(|n| n.min(2))
                .map_err(|_| Error::invalid("recursion", format!("recursion={s:?} is not 0, 1 or 2"))),
        }
    }

    /// Which costly parts `recursion=2;fields=state.disk,state.network` asks for; `None` is all.
    ///
    /// # Errors
    /// Invalid, for anything else behind the number, or a part that is none of `known`.
    pub fn recursion_fields(&self, known: &[&str]) -> Result<Option<Vec<&str>>> {
        let Some((_, rest)) = self.get("recursion").and_then(|s| s.split_once(';')) else { return Ok(None) };
        let wrong = |why: String| Error::invalid("recursion", why);
        let fields = rest
            .strip_prefix("fields=")
            .ok_or_else(|| wrong(format!("{rest:?} follows the recursion where fields=… may")))?;
        let fields: Vec<&str> = fields.split(',').filter(|f| !f.is_empty()).collect();
        match fields.iter().find(|f| !known.contains(f)) {
            Some(other) => Err(wrong(format!("field {other:?} cannot be chosen; {} can", known.join(", ")))),
            None => Ok(Some(fields)),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn integer(&self, name: &'static str) -> Result<Option<i64>> {
        self.get(name)
            .map(|s| {
                s.parse().map_err(|_| Error::invalid(name, format!("{name}={s:?} is not a whole number")))
            })
            .transpose()
    }

    /// `project`, `default` when absent.
    pub fn project(&self) -> &str {
        self.get("project").unwrap_or(karst_model::project::DEFAULT_PROJECT)
    }
}

/// The body of a request. What a handler leaves of it unread comes back to [`Unread`].
#[derive(Debug)]
pub struct RequestBody {
    incoming: Option<Incoming>,
    /// The client waits for leave to send it (`Expect: 100-continue`), and has it with the first read.
    asks: bool,
    unread: Arc<Mutex<Option<Incoming>>>,
}

impl RequestBody {
    /// The body of a request as its handler gets it, and what becomes of the rest.
    pub fn of(request: Request<Incoming>) -> (Request<Self>, Unread) {
        let unread = Arc::new(Mutex::new(None));
        let asks = request.headers().contains_key(EXPECT);
        let rest = Unread(unread.clone());
        (request.map(|incoming| Self { incoming: Some(incoming), asks, unread }), rest)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.asks = false;
        match &mut self.incoming {
            Some(incoming) => Pin::new(incoming).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if !self.asks && !self.is_end_stream() {
            *self.unread.lock().unwrap_or_else(|e| e.into_inner()) = self.incoming.take();
        }
    }
}

/// What is still read of a body whose request was refused, before the answer: whoever sends first and reads then would see a
/// broken connection instead of it.
const BEFORE: (u64, Duration) = (16 << 20, Duration::from_secs(2));
/// And while the answer is on its way, for clients that look at it while they send.
const AFTER: (u64, Duration) = (256 << 20, Duration::from_secs(10));

/// What a handler left of a body.
#[derive(Debug)]
pub struct Unread(Arc<Mutex<Option<Incoming>>>);

impl Unread {
    /// Reads it, within bounds, so that a client that is still sending sees `reply`, a refusal. Where it is more, the reply
    /// says that the connection ends with it.
    pub async fn settle(self, reply: &mut Reply) {
        let rest = self.0.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(mut body) = rest else { return };
        if swallow(&mut body, BEFORE).await {
            return;
        }
        reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        tokio::spawn(async move { swallow(&mut body, AFTER).await });
    }
}

/// Reads a body to its end; `false` when it is longer or slower than that.
async fn swallow(body: &mut Incoming, (most, time): (u64, Duration)) -> bool {
    let mut left = most;
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            let n = frame.data_ref().map_or(0, |d| d.len() as u64);
            match left.checked_sub(n) {
                Some(rest) => left = rest,
                None => return false,
            }
        }
        true
    };
    tokio::time::timeout(time, read).await.unwrap_or(false)
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// `TooLarge`, or invalid when the connection breaks.
pub async fn bytes(mut body: RequestBody, limit: usize) -> Result<Bytes> {
    let too_large = || {
        Error::too_large(format!("the body is larger than the {} KiB that are accepted here", limit >> 10))
    };
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let mut out = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| Error::invalid("body", "the body of the request broke off").with_context(e))?;
        if let Ok(data) = frame.into_data() {
            if out.len() + data.len() > limit {
                return Err(too_large());
            }
            out.extend_from_slice(&data);
        }
    }
    Ok(out.freeze())
}

/// Reads the body of a request that takes none, within small bounds. Clients such as Ansible's send `null` with every GET,
/// after the head; an answer that does not wait for it would close a connection that they go on using.
pub async fn discard(body: &mut Incoming) {
    if body.is_end_stream() || body.size_hint().lower() > 64 << 10 {
        return;
    }
    // What has not come by then may close the connection.
    swallow(body, (64 << 10, Duration::from_secs(10))).await;
}

/// Reads a JSON object.
///
/// # Errors
/// `TooLarge`, or invalid.
pub async fn fields(body: RequestBody) -> Result<Fields> {
    Fields::parse(&bytes(body, JSON_LIMIT).await?)
}

/// Reads the body of a change that says all by its path: nothing, `null`, or an object without fields.
///
/// # Errors
/// `TooLarge`, or invalid for anything else.
pub async fn nothing(body: RequestBody) -> Result<()> {
    let bytes = bytes(body, JSON_LIMIT).await?;
    match bytes.trim_ascii() {
        b"" | b"null" => Ok(()),
        said => Fields::parse(said)?.finish(&[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn path_tricks_are_refused() {
        for bad in [
            "1.0",
            "/1.0//instances",
            "/1.0/instances/..",
            "/1.0/instances/%2e%2e",
            "/1.0/instances/%2E",
            "/1.0/instances/a%00b",
            "/1.0/instances/%zz",
            "/1.0/instances/%4",
            "/1.0/instances/%ff",
            "/1.0/instances/a%0ab",
        ] {
            assert!(segments(bad).is_err(), "{bad}");
        }
        assert_eq!(segments("/1.0/images/aliases/debian%2F12").unwrap().last().unwrap(), "debian/12");
        assert_eq!(segments("/1.0/").unwrap(), ["1.0"]);
        assert!(segments("/").unwrap().is_empty());
    }

    #[test]
    fn queries_as_clients_send_them() {
        let q = Query::parse(Some(
            "filter=status+eq+running&recursion=2&project=&all-projects=true&path=%2Froot",
        ))
        .unwrap();
        assert_eq!(q.get("filter"), Some("status eq running"));
        assert_eq!(q.recursion().unwrap(), 2);
        assert_eq!(q.project(), "default");
        assert!(q.flag("all-projects"));
        assert_eq!(q.get("path"), Some("/root"));
        assert!(Query::parse(Some("a=%q")).is_err());
        assert!(Query::parse(Some("recursion=x")).unwrap().recursion().is_err());
        let some = Query::parse(Some("recursion=2%3Bfields%3Dstate.disk")).unwrap();
        assert_eq!(some.recursion().unwrap(), 2);
        assert_eq!(some.recursion_fields(&["state.disk"]).unwrap(), Some(vec!["state.disk"]));
        assert!(some.recursion_fields(&["state.network"]).is_err());
        let none = Query::parse(Some("recursion=2;fields=")).unwrap();
        assert_eq!(none.recursion_fields(&["state.disk"]).unwrap(), Some(vec![]));
        assert_eq!(q.recursion_fields(&[]).unwrap(), None);
        assert!(Query::parse(Some("recursion=2;x")).unwrap().recursion_fields(&[]).is_err());
    }

    proptest! {
        #[test]
        fn no_segment_leads_elsewhere(path in "/[a-zA-Z0-9./%_-]{0,60}") {
            if let Ok(list) = segments(&path) {
                for s in list {
                    prop_assert!(!s.is_empty() && s != "." && s != ".." && !s.contains('\0'));
                }
            }
        }
    }
}
