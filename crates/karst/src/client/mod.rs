//! The client of the API: requests and their envelopes. One request is one round trip on a kept connection;
//! nothing is asked for that the command does not need.

pub mod files;
pub mod multipart;
pub mod operation;
pub mod subject;
pub mod transport;
pub mod types;
pub mod url;
pub mod websocket;

use bytes::Bytes;
use hyper::{HeaderMap, Method, Request, Response, body::Incoming};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use subject::{About, Kind};
pub use transport::{Body, Transport, empty, full};
pub use types::{Envelope, Event, Instance, Operation};
pub use url::Url;

use crate::error::{Error, Result};

/// Name of the project that is meant where none is named.
pub const DEFAULT_PROJECT: &str = "default";

/// Cap on the size of one answer that is held in memory.
const LARGEST_ANSWER: usize = 256 << 20;

/// A server, and the project that requests are about.
#[derive(Debug)]
pub struct Client {
    transport: Transport,
    project: Option<String>,
    /// Files are those of custom volumes of this pool, and not of instances.
    pool: Option<String>,
}

/// What the server answered.
#[derive(Debug, Default)]
pub struct Answer {
    /// What was asked for.
    pub metadata: Value,
    /// Work that goes on, when the answer was asynchronous.
    pub operation: Option<Operation>,
    /// For `If-Match` of a later change.
    pub etag: Option<String>,
}

impl Client {
    /// A client of the server behind `transport`; connects at the first request.
    pub fn new(transport: Transport, project: Option<String>) -> Self {
        Self { transport, project, pool: None }
    }

    /// Another one, whose files are those of the custom volumes of a pool.
    #[must_use]
    pub fn for_volumes(&self, pool: String) -> Self {
        Self { transport: self.transport.another(), project: self.project.clone(), pool: Some(pool) }
    }

    /// The pool whose volumes' files are meant; `None`: those of instances.
    pub fn files_of(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    /// The project that requests are about.
    pub fn project(&self) -> &str {
        self.project.as_deref().unwrap_or(DEFAULT_PROJECT)
    }

    /// Where the server is.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// The request line's target of `url`.
    pub fn target(&self, url: &Url) -> String {
        url.render(self.project.as_deref())
    }

    /// Sends a request and hands back the answer as it comes; errors of the server are errors here.
    pub async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Body,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = self
            .target(url)
            .parse()
            .map_err(|_| Error::local(format!("\"{}\" is no path of an API", self.target(url))))?;
        *request.headers_mut() = headers;
        let response = self.transport.send(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = self.transport.collect(response, LARGEST_ANSWER).await?;
        Err(refusal(status, &body))
    }

    /// Sends a request and takes the envelope of its answer apart.
    pub async fn call(&self, method: Method, url: &Url, headers: HeaderMap, body: Body) -> Result<Answer> {
        let response = self.send(method, url, headers, body).await?;
        let etag =
            response.headers().get(hyper::header::ETAG).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let body = self.transport.collect(response, LARGEST_ANSWER).await?;
        let envelope: Envelope = serde_json::from_slice(&body)
            .map_err(|error| Error::local(format!("the server's answer is no JSON of this API: {error}")))?;
        match envelope.kind.as_str() {
            "error" => Err(Error::Api { status: envelope.error_code, message: envelope.error }),
            "async" => {
                let mut operation: Operation =
                    serde_json::from_value(envelope.metadata.clone()).unwrap_or_default();
                if operation.id.is_empty() {
                    operation.id = url::last_segment(&envelope.operation);
                }
                Ok(Answer { metadata: envelope.metadata, operation: Some(operation), etag })
            }
            _ => Ok(Answer { metadata: envelope.metadata, operation: None, etag }),
        }
    }

    /// GET.
    pub async fn get(&self, url: &Url) -> Result<Answer> {
        self.call(Method::GET, url, HeaderMap::new(), empty()).await
    }

    /// GET of something that this program knows the shape of.
    pub async fn get_as<T: DeserializeOwned>(&self, url: &Url) -> Result<T> {
        decode(self.get(url).await?.metadata)
    }

    /// A request with a JSON body, and with `If-Match` if an ETag is given.
    pub async fn change(
        &self,
        method: Method,
        url: &Url,
        body: &Value,
        etag: Option<&str>,
    ) -> Result<Answer> {
        let mut headers = HeaderMap::new();
        headers
            .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
        if let Some(value) = etag.and_then(|etag| etag.parse().ok()) {
            headers.insert(hyper::header::IF_MATCH, value);
        }
        self.call(method, url, headers, full(body.to_string())).await
    }

    /// POST with a JSON body.
    pub async fn post(&self, url: &Url, body: &Value) -> Result<Answer> {
        self.change(Method::POST, url, body, None).await
    }

    /// DELETE.
    pub async fn delete(&self, url: &Url) -> Result<Answer> {
        self.call(Method::DELETE, url, HeaderMap::new(), empty()).await
    }

    /// The body of an answer that is not JSON, whole.
    pub async fn bytes(&self, response: Response<Incoming>) -> Result<Bytes> {
        self.transport.collect(response, LARGEST_ANSWER).await
    }
}

/// Turns JSON of the server into a typed object.
pub fn decode<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|error| Error::local(format!("the server's answer has an unknown shape: {error}")))
}

/// The error in the body of a refused request.
pub fn refusal(status: u16, body: &[u8]) -> Error {
    let message = match serde_json::from_slice::<Envelope>(body) {
        Ok(envelope) if !envelope.error.is_empty() => envelope.error,
        _ => match String::from_utf8_lossy(body).trim() {
            "" => format!("the server answered with HTTP status {status}"),
            text => text.to_owned(),
        },
    };
    Error::Api { status, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_with_and_without_envelope() {
        let error = refusal(404, br#"{"type":"error","error":"Instance not found","error_code":404}"#);
        assert!(error.is_not_found());
        assert_eq!(error.to_string(), "Instance not found");
        assert_eq!(refusal(502, b"").to_string(), "the server answered with HTTP status 502");
        assert_eq!(refusal(500, b"boom\n").to_string(), "boom");
    }
}
