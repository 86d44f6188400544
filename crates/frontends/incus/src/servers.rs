//! Client of image servers: of the API of Incus, LXD and Karst, of simplestreams, and of registries of the OCI. What a server says is foreign: every
//! document, file and wait has a bound, only `https` is spoken, and a server that shows neither a certificate that the host
//! trusts nor the one that was stated is none.

mod https;
mod push;
mod registry;
mod streams;

use crate::multipart::{Multipart, boundary};
use crate::stream::Stream;
use async_trait::async_trait;
use futures::StreamExt;
use https::{Body, Https};
use hyper::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use karst_engine::images::{
    ImagePart, PartUpload,
    push::PushedImage,
    remote::{ImageServers, Parts, RemoteImage, RemoteSource},
};
use karst_model::{Config, Error, ErrorKind, Result, image::ImageServerProtocol, instance::InstanceKind};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

/// Longest answer about one image.
const ANSWER: u64 = 4 << 20;
/// How often progress is told, in bytes.
const TELL: u64 = 4 << 20;

/// Speaks to image servers over the network.
#[derive(Debug, Default)]
pub struct NetworkServers(());

impl NetworkServers {
    /// Of the host's trusted authorities (`SSL_CERT_FILE`, else the distribution's bundle), read when they are needed.
    pub fn new() -> Self {
        Self(())
    }
}

/// A server's answer made no sense.
fn nonsense(what: &str, why: impl std::fmt::Display) -> Error {
    Error::invalid("source.server", format!("the image server's {what} cannot be used")).with_context(why)
}

/// A part that comes: written, counted, hashed.
struct Sink {
    stream: Stream,
    upload: PartUpload,
    hash: Sha256,
    written: u64,
}

impl Sink {
    async fn open(to: &dyn Parts, part: ImagePart) -> Result<Self> {
        let upload = to.open(part).await?;
        let stream = Stream::new(upload.file.try_clone()?)?;
        Ok(Self { stream, upload, hash: Sha256::new(), written: 0 })
    }

    async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.written += data.len() as u64;
        self.upload.check(self.written)?;
        self.hash.update(data);
        Ok(self.stream.write_all(data).await?)
    }

    async fn end(mut self) -> Result<(u64, String)> {
        self.stream.flush().await?;
        let hash = self.hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok((self.written, hash))
    }
}

/// What has come of all, and what may.
struct Count<'a> {
    come: u64,
    told: u64,
    most: u64,
    to: &'a dyn Parts,
}

impl<'a> Count<'a> {
    fn new(most: u64, to: &'a dyn Parts) -> Self {
        Self { come: 0, told: 0, most, to }
    }

    fn add(&mut self, bytes: usize) -> Result<()> {
        self.come += bytes as u64;
        if self.most > 0 && self.come > self.most {
            let text = format!("the image server sends more than the {} bytes that it announced", self.most);
            return Err(Error::invalid("fingerprint", text));
        }
        if self.come - self.told >= TELL {
            self.told = self.come;
            self.to.progress(self.come);
        }
        Ok(())
    }
}

#[async_trait]
impl ImageServers for NetworkServers {
    async fn find(&self, source: &RemoteSource) -> Result<RemoteImage> {
        let https = Https::new(&source.from).await?;
        match source.from.protocol {
            ImageServerProtocol::Simplestreams => streams::find(&https, source).await,
            ImageServerProtocol::Oci => registry::find(&https, source).await,
            ImageServerProtocol::Incus => find(&https, source).await,
        }
    }

    async fn fetch(
        &self,
        source: &RemoteSource,
        image: &RemoteImage,
        to: &dyn Parts,
    ) -> Result<Vec<ImagePart>> {
        let https = Https::new(&source.from).await?;
        match source.from.protocol {
            ImageServerProtocol::Simplestreams => streams::fetch(&https, image, to).await,
            ImageServerProtocol::Oci => registry::fetch(&https, source, image, to).await,
            ImageServerProtocol::Incus => fetch(&https, source, image, to).await,
        }
    }

    async fn push(
        &self,
        target: &RemoteSource,
        image: PushedImage,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let https = Https::new(&target.from).await?;
        push::push(&https, target, image, told).await
    }
}

/// An answer of the API.
#[derive(Deserialize)]
struct Answer<T> {
    metadata: Option<T>,
}

#[derive(Deserialize)]
struct AliasAnswer {
    target: String,
}

#[derive(Deserialize)]
struct ImageAnswer {
    fingerprint: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    filename: String,
    #[serde(default)]
    properties: Option<Config>,
    #[serde(default)]
    expires_at: Option<String>,
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// The query that goes with each request about the image.
fn query(source: &RemoteSource, more: &[(&str, &str)]) -> String {
    let project = source.project.as_deref().filter(|p| !p.is_empty()).map(|p| ("project", p));
    let all = project.into_iter().chain(more.iter().copied());
    let all: Vec<String> = all.map(|(k, v)| format!("{k}={}", encoded(v))).collect();
    if all.is_empty() { String::new() } else { format!("?{}", all.join("&")) }
}

async fn json<T: for<'de> Deserialize<'de>>(https: &Https, path: &str) -> Result<T> {
    let text = https.document(path, ANSWER).await?;
    let answer: Answer<T> = serde_json::from_slice(&text).map_err(|e| nonsense("answer", e))?;
    answer.metadata.ok_or_else(|| nonsense("answer", "it has no metadata"))
}

async fn find(https: &Https, source: &RemoteSource) -> Result<RemoteImage> {
    let reference = &source.reference;
    let kind = source.from.kind.map(|k| ("type", k.as_str()));
    let named = format!("/1.0/images/aliases/{}{}", encoded(reference), query(source, kind.as_slice()));
    let secret = source.secret.as_deref().map(|s| ("secret", s));
    let whole = reference.len() == 64 && reference.bytes().all(|b| b.is_ascii_hexdigit());
    let (fingerprint, by_alias) = match whole {
        true => (reference.clone(), false),
        false => match json::<AliasAnswer>(https, &named).await {
            Ok(alias) => (alias.target, true),
            Err(e) if e.is(ErrorKind::NotFound) => (reference.clone(), false),
            Err(e) => return Err(e),
        },
    };
    if !fingerprint.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::not_found(format!("the image server has no image {reference:?}")));
    }
    let path = format!("/1.0/images/{}{}", encoded(&fingerprint), query(source, secret.as_slice()));
    let answer: ImageAnswer = json(https, &path).await.map_err(|e| match e.kind {
        ErrorKind::NotFound => Error::not_found(format!("the image server has no image {reference:?}")),
        _ => e,
    })?;
    let kind = if answer.kind.is_empty() { "container" } else { &answer.kind };
    Ok(RemoteImage {
        fingerprint: checked_fingerprint(&answer.fingerprint)?,
        kind: InstanceKind::parse("source.type", kind).map_err(|e| nonsense("answer", e))?,
        size: answer.size,
        filename: checked_name(&answer.filename),
        properties: checked_properties(answer.properties.unwrap_or_default())?,
        expires_at: answer
            .expires_at
            .and_then(|t| t.parse().ok())
            .filter(|t: &jiff::Timestamp| t.as_second() > 0),
        by_alias,
        files: vec![],
    })
}

fn checked_fingerprint(text: &str) -> Result<String> {
    match text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(nonsense("answer", "the fingerprint is none")),
    }
}

fn checked_properties(properties: Config) -> Result<Config> {
    let odd = |(k, v): (&String, &String)| k.len() > 128 || v.len() > 4096 || v.contains('\0');
    if properties.len() > 256 || properties.iter().any(odd) {
        return Err(nonsense("answer", "the image has too many or too long properties"));
    }
    Ok(properties)
}

/// The last component of what a server calls the file, as far as it is a plain name.
fn checked_name(text: &str) -> String {
    let last = text.rsplit('/').next().unwrap_or_default();
    last.chars().filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c)).take(128).collect()
}

async fn fetch(
    https: &Https,
    source: &RemoteSource,
    image: &RemoteImage,
    to: &dyn Parts,
) -> Result<Vec<ImagePart>> {
    let secret = source.secret.as_deref().map(|s| ("secret", s));
    let path = format!("/1.0/images/{}/export{}", image.fingerprint, query(source, secret.as_slice()));
    let (head, mut body) = https.get(&path).await?;
    let mut count = Count::new(image.size, to);
    let text = |name| head.headers.get(name).and_then(|v: &hyper::header::HeaderValue| v.to_str().ok());
    let content_type = text(CONTENT_TYPE).unwrap_or_default().to_owned();
    tracing::debug!(%content_type, disposition = text(CONTENT_DISPOSITION).unwrap_or_default(), "an image comes");
    if !content_type.starts_with("multipart/form-data") {
        let mut sink = Sink::open(to, ImagePart::Unified).await?;
        while let Some(data) = body.next().await? {
            count.add(data.len())?;
            sink.write(&data).await?;
        }
        let (_, hash) = sink.end().await?;
        if hash != image.fingerprint {
            return Err(differs(&hash, &image.fingerprint));
        }
        return Ok(vec![ImagePart::Unified]);
    }
    let boundary = boundary(&content_type).map_err(|e| nonsense("image", e))?;
    let pieces = futures::stream::unfold(body, |mut body: Body| async move {
        body.next().await.transpose().map(|piece| (piece, body))
    });
    let mut multipart = Multipart::new(pieces.boxed(), &boundary);
    let mut parts = vec![];
    while let Some((name, _)) = multipart.part().await? {
        let part = match name.as_str() {
            "metadata" if parts.is_empty() => ImagePart::Metadata,
            "rootfs" if parts.len() == 1 => ImagePart::Rootfs,
            "rootfs.img" if parts.len() == 1 => ImagePart::Disk,
            _ => return Err(nonsense("image", format!("a part {name:?} at this place"))),
        };
        let mut sink = Sink::open(to, part).await?;
        while let Some(data) = multipart.data().await? {
            count.add(data.len())?;
            sink.write(&data).await?;
        }
        sink.end().await?;
        parts.push(part);
    }
    if parts.len() != 2 {
        return Err(nonsense("image", "it has no root"));
    }
    Ok(parts)
}

fn differs(hash: &str, wanted: &str) -> Error {
    Error::invalid(
        "fingerprint",
        format!("what the image server sent is not what it announced: its SHA-256 is {hash}, not {wanted}"),
    )
}
