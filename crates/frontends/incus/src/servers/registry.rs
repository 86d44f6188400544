//! Registries of the OCI (distribution-spec 1.1), which Docker's is as well: a manifest by tag or digest, its blobs, and a token
//! for those who ask nothing but to read, or who say who they are. What comes is staged as one archive of a layout, which is
//! judged like one that somebody uploads; every blob is compared with its digest while it comes.

use super::{
    Count, Sink, checked_name, differs, encoded,
    https::{Body, Https},
    nonsense,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use hyper::{
    StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, WWW_AUTHENTICATE},
    http::response,
};
use karst_engine::images::{
    ImagePart,
    remote::{Login, Parts, RemoteImage, RemoteSource},
};
use karst_model::{
    Config, Error, Result,
    instance::InstanceKind,
    oci::{DOCUMENT, Descriptor, Manifest, choose, digest, is_index, manifest, parse},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use tokio::sync::Mutex;

const FIELD: &str = "source.alias";
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// What a client calls Docker's registry, and where that is.
const DOCKER: (&str, &str) = ("https://docker.io", "https://registry-1.docker.io");

/// A repository, and how it is spoken to.
struct Registry<'a> {
    https: &'a Https,
    base: String,
    repository: String,
    login: Option<&'a Login>,
    /// What is shown with each request, once it was asked for.
    authorization: Mutex<Option<String>>,
}

/// `NAME[:TAG][@DIGEST]`: the repository, and what of it is meant.
fn reference(text: &str, docker: bool) -> Result<(String, String)> {
    let wrong = || {
        Error::invalid(
            FIELD,
            format!("{text:?} is no image of a registry; write NAME, NAME:TAG or NAME@sha256:DIGEST"),
        )
    };
    let (name, wanted) = match text.split_once('@') {
        Some((name, hash)) => {
            digest(FIELD, hash)?;
            (name.split_once(':').map_or(name, |(name, _)| name), hash)
        }
        None => text.rsplit_once(':').unwrap_or((text, "latest")),
    };
    let part = |p: &str| {
        !p.is_empty()
            && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
            && !p.starts_with(['.', '-', '_'])
    };
    let tag = |t: &str| {
        (1..=128).contains(&t.len())
            && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && !t.starts_with(['.', '-'])
    };
    if !name.split('/').all(part) || !(wanted.starts_with("sha256:") || tag(wanted)) {
        return Err(wrong());
    }
    let name = if docker && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
    Ok((name, wanted.to_owned()))
}

/// A challenge's parts: `Bearer realm="…",service="…",scope="…"`.
fn challenge(text: &str) -> Option<Vec<(&str, &str)>> {
    let (kind, rest) = text.split_once(' ')?;
    if !kind.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut parts = vec![];
    let mut rest = rest.trim();
    while let Some((name, value)) = rest.split_once("=\"") {
        let (value, more) = value.split_once('"')?;
        parts.push((name.trim_matches([',', ' ']), value));
        rest = more;
    }
    Some(parts)
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl<'a> Registry<'a> {
    fn of(https: &'a Https, source: &'a RemoteSource) -> Result<(Self, String)> {
        let docker = https.base() == DOCKER.0;
        let base = if docker { DOCKER.1 } else { https.base() };
        let (repository, wanted) = reference(&source.reference, docker)?;
        let (base, login) = (base.to_owned(), source.login.as_ref());
        Ok((Self { https, base, repository, login, authorization: Mutex::default() }, wanted))
    }

    /// Asks once, and once more with what is wanted.
    async fn get(&self, what: &str, accept: &str) -> Result<(response::Parts, Body)> {
        let address = format!("{}/v2/{}/{what}", self.base, self.repository);
        for second in [false, true] {
            let mut headers: Vec<(HeaderName, String)> = vec![(ACCEPT, accept.to_owned())];
            if let Some(shown) = &*self.authorization.lock().await {
                headers.push((AUTHORIZATION, shown.clone()));
            }
            let (head, body) = self.https.ask(&address, &headers).await?;
            if head.status != StatusCode::UNAUTHORIZED {
                return Ok((head, body));
            }
            if second {
                break;
            }
            let asked = head.headers.get_all(WWW_AUTHENTICATE).iter();
            let asked: Vec<&str> = asked.filter_map(|v| v.to_str().ok()).collect();
            let shown = self.sign_in(&asked).await?;
            *self.authorization.lock().await = Some(shown);
        }
        let (host, repository) = (self.host(), &self.repository);
        Err(match self.login {
            Some(_) => self.refused(),
            // Registries answer so for what is not there, too.
            None => Error::not_found(format!(
                "the registry has no image {repository:?} that everybody may read; check the name, or say who you are: \
                 karst image registry add {host} --user NAME"
            )),
        })
    }

    fn host(&self) -> &str {
        let rest = self.https.base().trim_start_matches("https://");
        rest.split('/').next().unwrap_or(rest)
    }

    /// Who asks is nobody, or not who he says.
    fn refused(&self) -> Error {
        let (host, repository) = (self.host(), &self.repository);
        Error::forbidden(match self.login {
            Some(login) => format!(
                "the registry {host} does not let {:?} read {repository:?}; check the name and set the password again: \
                 karst image registry add {host} --user NAME",
                login.user
            ),
            None => format!(
                "the registry {host} wants a name and a password: karst image registry add {host} --user NAME"
            ),
        })
    }

    /// What is to be shown: a token that the registry's own server gives, or name and password.
    async fn sign_in(&self, asked: &[&str]) -> Result<String> {
        let basic = self.login.map(|login| {
            let both = [login.user.as_bytes(), b":", login.password.bytes()].concat();
            format!("Basic {}", BASE64_STANDARD.encode(both))
        });
        let Some(parts) = asked.iter().find_map(|a| challenge(a)) else {
            let wanted =
                |a: &&str| a.split(' ').next().is_some_and(|kind| kind.eq_ignore_ascii_case("basic"));
            return match basic {
                Some(basic) if asked.iter().any(wanted) => Ok(basic),
                _ => Err(self.refused()),
            };
        };
        let get = |name: &str| parts.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        let realm = get("realm").ok_or_else(|| self.refused())?;
        let mut address = realm.to_owned();
        let scope = format!("repository:{}:pull", self.repository);
        for (name, value) in [("service", get("service")), ("scope", Some(get("scope").unwrap_or(&scope)))] {
            if let Some(value) = value {
                let sign = if address.contains('?') { '&' } else { '?' };
                address.push_str(&format!("{sign}{name}={}", encoded(value)));
            }
        }
        let headers: Vec<(HeaderName, String)> = basic.into_iter().map(|b| (AUTHORIZATION, b)).collect();
        let (head, body) = self.https.ask(&address, &headers).await?;
        if head.status != StatusCode::OK {
            return Err(self.refused());
        }
        let text = read(body, 64 << 10).await?;
        let token: Token = serde_json::from_slice(&text).map_err(|e| nonsense("token", e))?;
        let token = if token.token.is_empty() { token.access_token } else { token.token };
        match token.is_empty() || token.len() > 32 << 10 || !token.bytes().all(|b| b.is_ascii_graphic()) {
            true => Err(nonsense("token", "none, or no token")),
            false => Ok(format!("Bearer {token}")),
        }
    }

    /// A manifest or index and its digest.
    async fn document(&self, wanted: &str) -> Result<(Vec<u8>, String, String)> {
        let (head, body) = self.get(&format!("manifests/{wanted}"), MANIFESTS).await?;
        let kind =
            head.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let text = read(body, DOCUMENT).await?;
        let hex = format!("{:x}", Sha256::digest(&text));
        if let Some(asked) = wanted.strip_prefix("sha256:")
            && asked != hex
        {
            return Err(differs(&hex, asked));
        }
        Ok((text, hex, kind))
    }

    /// The manifest for this machine: its text, digest and content.
    async fn manifest(&self, wanted: &str) -> Result<(Vec<u8>, String, Manifest)> {
        let (mut text, mut hex, kind) = self.document(wanted).await?;
        #[derive(Deserialize)]
        struct Kind {
            #[serde(default, rename = "mediaType")]
            media_type: String,
            #[serde(default)]
            manifests: Option<serde::de::IgnoredAny>,
        }
        let own: Kind = parse(FIELD, "manifest", &text)?;
        if is_index(&kind) || is_index(&own.media_type) || own.manifests.is_some() {
            let chosen = choose(FIELD, &text)?;
            digest(FIELD, &chosen.digest)?;
            (text, hex, _) = self.document(&chosen.digest).await?;
        }
        let manifest = manifest(FIELD, &text)?;
        Ok((text, hex, manifest))
    }
}

async fn read(mut body: Body, limit: u64) -> Result<Vec<u8>> {
    let mut all = vec![];
    while let Some(piece) = body.next().await? {
        if (all.len() + piece.len()) as u64 > limit {
            return Err(nonsense("answer", format!("more than {limit} bytes")));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// Blobs of an image, each once.
fn blobs(manifest: &Manifest) -> Vec<&Descriptor> {
    let mut seen = BTreeSet::new();
    std::iter::once(&manifest.config).chain(&manifest.layers).filter(|d| seen.insert(&d.digest)).collect()
}

pub(super) async fn find(https: &Https, source: &RemoteSource) -> Result<RemoteImage> {
    let (registry, wanted) = Registry::of(https, source)?;
    let (text, hex, manifest) = registry.manifest(&wanted).await?;
    let sum = |n: u64, d: &&Descriptor| n.checked_add(d.size);
    let size = blobs(&manifest).iter().try_fold(text.len() as u64, sum);
    let size = size.filter(|s| *s < 1 << 50).ok_or_else(|| nonsense("manifest", "sizes that cannot be"))?;
    let host = https.base().trim_start_matches("https://");
    let by_alias = !wanted.starts_with("sha256:");
    let id = if by_alias { format!("{}:{wanted}", registry.repository) } else { registry.repository.clone() };
    Ok(RemoteImage {
        fingerprint: hex,
        kind: InstanceKind::Container,
        size,
        filename: checked_name(&format!("{}.tar", id.replace(['/', ':'], "-"))),
        properties: Config::from([
            ("description".to_owned(), format!("{host}/{id} (OCI)")),
            ("id".to_owned(), id),
            ("type".to_owned(), "oci".to_owned()),
        ]),
        expires_at: None,
        by_alias,
        files: vec![],
    })
}

pub(super) async fn fetch(
    https: &Https,
    source: &RemoteSource,
    image: &RemoteImage,
    to: &dyn Parts,
) -> Result<Vec<ImagePart>> {
    let (registry, _) = Registry::of(https, source)?;
    let (text, hex, manifest) = registry.manifest(&format!("sha256:{}", image.fingerprint)).await?;
    if hex != image.fingerprint {
        return Err(differs(&hex, &image.fingerprint));
    }
    let mut sink = Sink::open(to, ImagePart::Unified).await?;
    let mut count = Count::new(image.size, to);
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": MANIFEST, "digest": format!("sha256:{hex}"), "size": text.len()}],
    });
    file(&mut sink, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).await?;
    file(&mut sink, "index.json", index.to_string().as_bytes()).await?;
    count.add(text.len())?;
    file(&mut sink, &format!("blobs/sha256/{hex}"), &text).await?;
    for blob in blobs(&manifest) {
        let wanted = digest(FIELD, &blob.digest)?;
        sink.write(&header(&format!("blobs/sha256/{wanted}"), blob.size)).await?;
        let (_, mut body) = registry.get(&format!("blobs/{}", blob.digest), "*/*").await?;
        let (mut hash, mut come) = (Sha256::new(), 0u64);
        while let Some(piece) = body.next().await? {
            come += piece.len() as u64;
            if come > blob.size {
                return Err(nonsense("blob", format!("{} is larger than announced", blob.digest)));
            }
            count.add(piece.len())?;
            hash.update(&piece);
            sink.write(&piece).await?;
        }
        let got = format!("{:x}", hash.finalize());
        if got != wanted || come != blob.size {
            return Err(differs(&got, wanted));
        }
        sink.write(&padding(blob.size)).await?;
    }
    // The end mark.
    sink.write(&[0; 1024]).await?;
    sink.end().await?;
    Ok(vec![ImagePart::Unified])
}

async fn file(sink: &mut Sink, name: &str, content: &[u8]) -> Result<()> {
    sink.write(&header(name, content.len() as u64)).await?;
    sink.write(content).await?;
    sink.write(&padding(content.len() as u64)).await
}

fn padding(size: u64) -> Vec<u8> {
    vec![0; (size.next_multiple_of(512) - size) as usize]
}

/// The header of a file in an archive (POSIX ustar; GNU's form of sizes above 8 GiB).
fn header(name: &str, size: u64) -> [u8; 512] {
    let mut out = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| out[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    match size < 1 << 33 {
        true => put(124, format!("{size:011o}\0").as_bytes()),
        false => {
            put(124, &[0x80, 0, 0, 0]);
            put(128, &size.to_be_bytes());
        }
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = out.iter().map(|b| u32::from(*b)).sum();
    out[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images() {
        let of = |text: &str, docker| reference(text, docker).map_err(|e| e.field);
        let pair = |a: &str, b: &str| Ok((a.to_owned(), b.to_owned()));
        assert_eq!(of("alpine", true), pair("library/alpine", "latest"));
        assert_eq!(of("alpine:3.20", false), pair("alpine", "3.20"));
        assert_eq!(of("team/app/web:v1", true), pair("team/app/web", "v1"));
        let hash = format!("sha256:{}", "a".repeat(64));
        assert_eq!(of(&format!("a/b:x@{hash}"), true), pair("a/b", &hash));
        for wrong in ["", "A", "a//b", "../x", "a:b:c", "a@sha256:zz", "a: b", "a:", "/a", "a?x"] {
            assert!(of(wrong, false).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_asks_for_a_token_says_where() {
        let parts =
            challenge(r#"Bearer realm="https://a/t",service="s, x",scope="repository:a:pull""#).unwrap();
        assert_eq!(parts, [("realm", "https://a/t"), ("service", "s, x"), ("scope", "repository:a:pull")]);
        assert!(challenge(r#"Basic realm="x""#).is_none() && challenge("").is_none());
        assert!(challenge("Bearer realm=\"open").is_none());
    }

    #[test]
    fn headers_of_an_archive() {
        let head = header("index.json", 5);
        assert_eq!((&head[..10], &head[124..136]), (b"index.json".as_slice(), b"00000000005\0".as_slice()));
        let sum: u32 = head
            .iter()
            .enumerate()
            .map(|(n, b)| if (148..156).contains(&n) { 32 } else { u32::from(*b) })
            .sum();
        assert_eq!(&head[148..154], format!("{sum:06o}").as_bytes());
        assert_eq!(header("x", 1 << 40)[124], 0x80);
        assert_eq!((padding(0).len(), padding(1).len(), padding(512).len()), (0, 511, 0));
    }
}
