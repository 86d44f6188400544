//! Files in guests: one request a file, its owner and mode in headers.

use futures::{Stream, TryStreamExt};
use http_body_util::BodyStream;
use hyper::{HeaderMap, Method, Response, body::Incoming, header::HeaderValue};
use serde_json::Value;

use super::{Body, Client, Url, empty};
use crate::error::{Error, Result};

/// What kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// With contents.
    File,
    /// With entries.
    Directory,
    /// With a target.
    Symlink,
}

impl FileType {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
        }
    }
}

/// Owner and mode; `None` leaves the choice to the server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// User id.
    pub uid: Option<u32>,
    /// Group id.
    pub gid: Option<u32>,
    /// Permission bits.
    pub mode: Option<u32>,
}

/// A file of a guest, its contents on their way.
pub struct GuestFile {
    /// Its kind.
    pub kind: FileType,
    /// Owner and mode.
    pub attributes: Attributes,
    /// Size of a file in bytes, where the server says.
    pub size: Option<u64>,
    response: Response<Incoming>,
}

impl Client {
    fn file_url(&self, of: &str, path: &str) -> Url {
        let url = match self.files_of() {
            Some(pool) => Url::new(&["storage-pools", pool, "volumes", "custom", of, "files"]),
            None => Url::new(&["instances", of, "files"]),
        };
        url.with("path", path)
    }

    /// Asks for a file.
    pub async fn file(&self, instance: &str, path: &str) -> Result<GuestFile> {
        let response =
            self.send(Method::GET, &self.file_url(instance, path), HeaderMap::new(), empty()).await?;
        let headers = response.headers();
        let kind = match header(headers, "type") {
            Some("directory") => FileType::Directory,
            Some("symlink") => FileType::Symlink,
            _ => FileType::File,
        };
        let number = |name: &str| header(headers, name)?.parse().ok();
        let attributes = Attributes {
            uid: number("uid"),
            gid: number("gid"),
            mode: header(headers, "mode").and_then(|mode| u32::from_str_radix(mode, 8).ok()),
        };
        let size = headers.get(hyper::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        Ok(GuestFile { kind, attributes, size, response })
    }

    /// Makes or replaces a file.
    pub async fn put_file(
        &self,
        instance: &str,
        path: &str,
        kind: FileType,
        attributes: Attributes,
        body: Body,
    ) -> Result<()> {
        let mut headers = HeaderMap::new();
        headers.insert("x-incus-type", HeaderValue::from_static(kind.name()));
        headers.insert("x-incus-write", HeaderValue::from_static("overwrite"));
        headers.insert(hyper::header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Some(uid) = attributes.uid {
            headers.insert("x-incus-uid", uid.into());
        }
        if let Some(gid) = attributes.gid {
            headers.insert("x-incus-gid", gid.into());
        }
        if let Some(mode) = attributes.mode {
            let text = format!("{:04o}", mode & 0o7777);
            headers.insert("x-incus-mode", HeaderValue::from_str(&text).map_err(Error::local)?);
        }
        self.call(Method::POST, &self.file_url(instance, path), headers, body).await.map(drop)
    }

    /// Removes a file.
    pub async fn delete_file(&self, instance: &str, path: &str) -> Result<()> {
        self.delete(&self.file_url(instance, path)).await.map(drop)
    }
}

impl GuestFile {
    /// Names of the entries of a directory.
    pub async fn entries(self, client: &Client) -> Result<Vec<String>> {
        let envelope: Value =
            serde_json::from_slice(&client.bytes(self.response).await?).map_err(Error::local)?;
        let names = envelope["metadata"].as_array().into_iter().flatten();
        Ok(names.filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// All of its contents (a symlink's: its target).
    pub async fn bytes(self, client: &Client) -> Result<bytes::Bytes> {
        client.bytes(self.response).await
    }

    /// Its contents as they come.
    pub fn chunks(self) -> impl Stream<Item = std::io::Result<bytes::Bytes>> {
        body_chunks(self.response)
    }
}

/// The body of an answer as it comes.
pub fn body_chunks(response: Response<Incoming>) -> impl Stream<Item = std::io::Result<bytes::Bytes>> {
    BodyStream::new(response.into_body())
        .map_err(std::io::Error::other)
        .try_filter_map(|frame| async move { Ok(frame.into_data().ok()) })
}

/// `X-Incus-NAME`.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(format!("x-incus-{name}"))?.to_str().ok()
}
