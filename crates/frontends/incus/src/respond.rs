//! Answers in Incus' envelope: `{"type":"sync|async|error", …, "metadata":…}`, and how Karst's errors become HTTP.

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full, combinators::UnsyncBoxBody};
use hyper::{
    Response, StatusCode,
    header::{CONTENT_TYPE, ETAG, HeaderValue, LOCATION},
};
use karst_model::{Error, ErrorKind, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::io;

/// Body of an answer: whole, or a stream.
pub type Body = Either<Full<Bytes>, UnsyncBoxBody<Bytes, io::Error>>;
/// An answer.
pub type Reply = Response<Body>;

/// A whole body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Either::Left(Full::new(bytes.into()))
}

/// A body that is sent while it is made.
pub fn stream<B>(body: B) -> Body
where
    B: hyper::body::Body<Data = Bytes, Error = io::Error> + Send + 'static,
{
    Either::Right(body.boxed_unsync())
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const SYNC: &[u8] =
    br#"{"type":"sync","status":"Success","status_code":200,"operation":"","error_code":0,"error":"","metadata":"#;

fn json(status: StatusCode, body: Vec<u8>) -> Reply {
    let mut reply = Response::new(full(body));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, JSON);
    reply
}

/// 200 with `metadata`, serialized once.
///
/// # Errors
/// Internal, when a value cannot be encoded.
pub fn sync(metadata: &impl Serialize) -> Result<Reply> {
    let mut body = Vec::with_capacity(512);
    body.extend_from_slice(SYNC);
    serde_json::to_writer(&mut body, metadata)?;
    body.extend_from_slice(b"}\n");
    Ok(json(StatusCode::OK, body))
}

/// 200 with `metadata` that is JSON already.
pub fn sync_raw(metadata: &[u8]) -> Reply {
    let mut body = Vec::with_capacity(SYNC.len() + metadata.len() + 2);
    body.extend_from_slice(SYNC);
    body.extend_from_slice(metadata);
    body.extend_from_slice(b"}\n");
    json(StatusCode::OK, body)
}

/// 200 with an ETag.
///
/// # Errors
/// Internal, when a value cannot be encoded.
pub fn sync_etag(metadata: &impl Serialize, tag: &Etag) -> Result<Reply> {
    let mut reply = sync(metadata)?;
    reply.headers_mut().insert(ETAG, tag.header());
    Ok(reply)
}

/// 200 without anything to say.
pub fn empty() -> Reply {
    sync_raw(b"{}")
}

/// 201: something was made, at `location`.
///
/// # Errors
/// Internal, when the location is no header value (names are checked before).
pub fn created(location: &str) -> Result<Reply> {
    let mut reply = sync_raw(b"null");
    *reply.status_mut() = StatusCode::CREATED;
    reply.headers_mut().insert(LOCATION, header(location)?);
    Ok(reply)
}

/// 202: an operation does it; `operation` is its view, `id` its UUID.
///
/// # Errors
/// Internal, when a value cannot be encoded.
pub fn accepted(id: &str, operation: &impl Serialize) -> Result<Reply> {
    let path = format!("/1.0/operations/{id}");
    let mut body = Vec::with_capacity(640);
    body.extend_from_slice(
        format!(
            r#"{{"type":"async","status":"Operation created","status_code":100,"operation":"{path}","error_code":0,"error":"","metadata":"#
        )
        .as_bytes(),
    );
    serde_json::to_writer(&mut body, operation)?;
    body.extend_from_slice(b"}\n");
    let mut reply = json(StatusCode::ACCEPTED, body);
    reply.headers_mut().insert(LOCATION, header(&path)?);
    Ok(reply)
}

fn header(s: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(s).map_err(|e| Error::internal("an answer could not be encoded", e))
}

/// The status of each kind of error.
pub fn status_of(error: &Error) -> StatusCode {
    match error.kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict | ErrorKind::Cancelled => StatusCode::CONFLICT,
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
        // Incus' clients treat 401 as "log in by OIDC"; an unknown caller gets 403 from Incus too.
        ErrorKind::Unauthenticated | ErrorKind::Forbidden | ErrorKind::Quota => StatusCode::FORBIDDEN,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unsupported if error.field.is_some() => StatusCode::BAD_REQUEST,
        ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Unavailable | ErrorKind::Timeout => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// An error in the envelope. Its private context goes to the log only.
pub fn error(error: &Error) -> Reply {
    let status = status_of(error);
    match error.kind {
        ErrorKind::Internal => {
            tracing::error!(error = %error, context = error.context.as_deref(), "request failed");
        }
        _ => tracing::debug!(error = %error, context = error.context.as_deref(), "request refused"),
    }
    envelope_error(status, &error.to_string())
}

/// An error of this status and text.
pub fn envelope_error(status: StatusCode, text: &str) -> Reply {
    let text = serde_json::Value::from(text);
    json(
        status,
        format!(
            r#"{{"type":"error","status":"","status_code":0,"operation":"","error_code":{},"error":{text},"metadata":null}}{}"#,
            status.as_u16(),
            "\n"
        )
        .into_bytes(),
    )
}

/// ETag of one view of one object at one version: a hash of (kind of view, uuid, `spec_version`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Etag(String);

impl Etag {
    /// Computes it.
    pub fn of(view: &str, id: uuid::Uuid, version: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(view.as_bytes());
        hash.update([0]);
        hash.update(id.as_bytes());
        hash.update(version.to_be_bytes());
        let mut text = String::with_capacity(66);
        text.push('"');
        for byte in hash.finalize() {
            use std::fmt::Write;
            let _ = write!(text, "{byte:02x}");
        }
        text.push('"');
        Self(text)
    }

    fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.0).unwrap_or(HeaderValue::from_static(""))
    }

    /// Demands that an If-Match, if there is one, names this. Quoted, weak and unquoted forms are taken, and `*`.
    ///
    /// # Errors
    /// `PreconditionFailed` (412).
    pub fn demand(&self, if_match: Option<&str>) -> Result<()> {
        let Some(wanted) = if_match.map(str::trim).filter(|w| !w.is_empty()) else {
            return Ok(());
        };
        let bare = self.0.trim_matches('"');
        let matches = wanted.split(',').any(|one| {
            let one = one.trim();
            let one = one.strip_prefix("W/").unwrap_or(one);
            one == "*" || one.trim_matches('"') == bare
        });
        if matches {
            return Ok(());
        }
        Err(Error::precondition_failed(
            "ETag doesn't match: the object was changed since it was read; read it again and repeat the change",
        ))
    }

    /// Its text, with quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(reply: Reply) -> String {
        let bytes = reply.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn envelopes_are_incus() {
        insta::assert_snapshot!(text(sync(&serde_json::json!({"a": 1})).unwrap()).await, @r#"{"type":"sync","status":"Success","status_code":200,"operation":"","error_code":0,"error":"","metadata":{"a":1}}"#);
        insta::assert_snapshot!(text(accepted("x", &()).unwrap()).await, @r#"{"type":"async","status":"Operation created","status_code":100,"operation":"/1.0/operations/x","error_code":0,"error":"","metadata":null}"#);
        let e = error(&Error::invalid("config.limits.memory", "\"x\" is not a size"));
        assert_eq!(e.status(), StatusCode::BAD_REQUEST);
        insta::assert_snapshot!(text(e).await, @r#"{"type":"error","status":"","status_code":0,"operation":"","error_code":400,"error":"config.limits.memory: \"x\" is not a size","metadata":null}"#);
        let secret = error(&Error::internal("it failed", "argv of a program"));
        assert!(!text(secret).await.contains("argv"));
    }

    #[test]
    fn every_kind_has_its_class() {
        for (kind, code) in [
            (ErrorKind::NotFound, 404),
            (ErrorKind::Conflict, 409),
            (ErrorKind::Invalid, 400),
            (ErrorKind::PreconditionFailed, 412),
            (ErrorKind::Unauthenticated, 403),
            (ErrorKind::Forbidden, 403),
            (ErrorKind::Quota, 403),
            (ErrorKind::TooLarge, 413),
            (ErrorKind::Unsupported, 501),
            (ErrorKind::Unavailable, 503),
            (ErrorKind::Timeout, 503),
            (ErrorKind::Cancelled, 409),
            (ErrorKind::Internal, 500),
        ] {
            assert_eq!(status_of(&Error::new(kind, "x")).as_u16(), code, "{kind:?}");
        }
    }

    #[test]
    fn etags_change_with_each_part_and_match_in_all_notations() {
        let id = uuid::Uuid::from_u128(7);
        let tag = Etag::of("instance", id, 1);
        assert!(tag != Etag::of("instance", id, 2) && tag != Etag::of("profile", id, 1));
        let bare = tag.as_str().trim_matches('"');
        for good in
            [None, Some(""), Some("*"), Some(tag.as_str()), Some(bare), Some(&*format!("W/\"{bare}\""))]
        {
            tag.demand(good).unwrap();
        }
        assert!(tag.demand(Some("\"00\"")).unwrap_err().is(ErrorKind::PreconditionFailed));
    }
}
