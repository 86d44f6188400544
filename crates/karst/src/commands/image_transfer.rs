//! Importing and exporting images, as streams.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use hyper::{HeaderMap, Method, header::HeaderValue};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::json;
use tokio_util::io::ReaderStream;

use super::{
    image::Import,
    image_alias::add_alias,
    object::{config_object, parse_pairs},
    transfer::{Target, broken, open},
};
use crate::{
    client::{
        Url, empty,
        files::body_chunks,
        multipart::{self, Part, Reader},
        transport::{CHUNK, streamed},
    },
    context::{Context, at},
    error::{Error, Result},
    output::{self, progress::Progress},
};

/// How a qcow2 file begins: such a disk is a virtual machine's.
const QCOW2: &[u8] = b"QFI\xfb";

/// Sends an image and gives it its aliases.
pub async fn import(context: &Context, options: Import) -> Result<()> {
    let url = Url::new(&["images"]);
    let progress = context.progress("importing");
    let answer = if options.source.starts_with("https://") || options.source.starts_with("http://") {
        let source = json!({"type": "url", "mode": "pull", "protocol": "direct", "url": options.source});
        let properties = config_object(&options.properties)?;
        context
            .client
            .post(&url, &json!({"source": source, "public": options.public, "properties": properties}))
            .await?
    } else {
        let (headers, body) = upload(&options, &progress).await?;
        context.client.call(Method::POST, &url, headers, streamed(body)).await?
    };
    progress.finish();
    let operation = context.finish(answer, "importing").await?;
    let fingerprint = operation
        .as_ref()
        .and_then(|operation| operation.metadata.get("fingerprint")?.as_str())
        .ok_or_else(|| Error::local("the server does not say the fingerprint"))?;
    for alias in &options.alias {
        add_alias(&context.client, alias, fingerprint).await?;
    }
    output::line(fingerprint)
}

/// Headers and body of an upload.
async fn upload(
    options: &Import,
    progress: &Progress,
) -> Result<(HeaderMap, stream::BoxStream<'static, std::io::Result<Bytes>>)> {
    let mut headers = HeaderMap::new();
    let mut set = |name: &'static str, value: &str| -> Result<()> {
        headers.insert(
            name,
            HeaderValue::from_str(value).map_err(|_| Error::local(format!("\"{value}\" cannot be sent")))?,
        );
        Ok(())
    };
    if options.public {
        set("x-incus-public", "1")?;
    }
    if !options.properties.is_empty() {
        let escape = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let pairs = parse_pairs(&options.properties)?;
        let pairs: Vec<String> =
            pairs.iter().map(|(key, value)| format!("{}={}", escape(key), escape(value))).collect();
        set("x-incus-properties", &pairs.join("&"))?;
    }
    let source = PathBuf::from(&options.source);
    if let Some(format) = disk_format(options)? {
        set("x-karst-disk-format", &format)?;
    }
    let Some(rootfs) = &options.rootfs else {
        let (file, size) = open(&source).await?;
        set("x-incus-filename", &escaped_name(&source))?;
        set("content-type", "application/octet-stream")?;
        return Ok((headers, progress.count(Some(size), ReaderStream::with_capacity(file, CHUNK)).boxed()));
    };
    let field = if begins_with(rootfs, QCOW2)? { "rootfs.img" } else { "rootfs" };
    let (metadata, metadata_size) = open(&source).await?;
    let (disk, disk_size) = open(rootfs).await?;
    let part = |name, path: &Path, file| Part {
        name,
        filename: file_name(path),
        chunks: ReaderStream::with_capacity(file, CHUNK).boxed(),
    };
    let boundary = boundary();
    set("content-type", &format!("multipart/form-data; boundary={boundary}"))?;
    let body =
        multipart::encode(&boundary, vec![part("metadata", &source, metadata), part(field, rootfs, disk)]);
    Ok((headers, progress.count(Some(metadata_size + disk_size), body).boxed()))
}

/// The format of a disk by itself: as stated, or as the name of the file says.
fn disk_format(options: &Import) -> Result<Option<String>> {
    if options.rootfs.is_some() {
        return match &options.format {
            Some(_) => Err(Error::Usage("--format is for a disk by itself, not for two files".to_owned())),
            None => Ok(None),
        };
    }
    let extension = Path::new(&options.source).extension().and_then(|e| e.to_str()).unwrap_or_default();
    let named = match extension.to_ascii_lowercase().as_str() {
        known @ ("qcow2" | "vmdk" | "ova" | "raw") => Some(known.to_owned()),
        "img" => Some("raw".to_owned()),
        _ => None,
    };
    Ok(options.format.clone().or(named))
}

/// A boundary that no file holds by chance.
fn boundary() -> String {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    format!("karst-{:x}-{nanos:x}-8d1f0c5be2a94437", std::process::id())
}

fn begins_with(path: &Path, magic: &[u8]) -> Result<bool> {
    let mut beginning = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| at(path, &error))?;
    file.take(magic.len() as u64).read_to_end(&mut beginning).map_err(|error| at(path, &error))?;
    Ok(beginning == magic)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Header values are ASCII.
fn escaped_name(path: &Path) -> String {
    file_name(path).chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).collect()
}

/// Writes an image to one file, or to two when metadata and disk are apart.
pub async fn export(context: &Context, fingerprint: &str, target: Option<&Path>) -> Result<()> {
    let url = Url::new(&["images", fingerprint, "export"]);
    let response = context.client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
    let header = |name: hyper::header::HeaderName| {
        response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    };
    let boundary = multipart::boundary(&header(hyper::header::CONTENT_TYPE));
    let name =
        offered_name(&header(hyper::header::CONTENT_DISPOSITION)).unwrap_or_else(|| fingerprint.to_owned());
    let size = header(hyper::header::CONTENT_LENGTH).parse().ok();
    let progress = context.progress("exporting");
    let chunks = progress.count(size, body_chunks(response));
    let Some(boundary) = boundary else {
        let written = Target::of(target, &name)?.fill(chunks).await?;
        progress.finish();
        return match written {
            Some(path) => output::line(&path.display().to_string()),
            None => Ok(()),
        };
    };
    if target == Some(Path::new("-")) {
        return Err(Error::Local("this image has two files: name a directory instead of stdout".to_owned()));
    }
    let directory = target.unwrap_or(Path::new("."));
    if !directory.is_dir() {
        return Err(Error::Local(format!(
            "this image has two files: {} must be a directory",
            directory.display()
        )));
    }
    let chunks = std::pin::pin!(chunks);
    let mut reader = Reader::new(chunks, &boundary);
    let mut written = Vec::new();
    while let Some(offered) = reader.next_part().await.map_err(broken)? {
        let path = directory
            .join(plain_name(&offered).unwrap_or_else(|| format!("{fingerprint}.{}", written.len())));
        let part = stream::try_unfold(&mut reader, |reader| async move {
            Ok(reader.next_chunk().await?.map(|chunk| (chunk, reader)))
        });
        Target::file(&path)?.fill(part).await?;
        written.push(path);
    }
    progress.finish();
    for path in written {
        output::line(&path.display().to_string())?;
    }
    Ok(())
}

/// The file name that a `Content-Disposition` offers.
fn offered_name(disposition: &str) -> Option<String> {
    let value = disposition.split(';').find_map(|word| word.trim().strip_prefix("filename="))?;
    plain_name(value.trim_matches('"'))
}

/// Only the last component: a server does not choose our directories.
fn plain_name(name: &str) -> Option<String> {
    let name = name.rsplit('/').next()?;
    (!matches!(name, "" | "." | "..")).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offered_names_stay_here() {
        assert_eq!(offered_name("inline;filename=abc.tar.xz").as_deref(), Some("abc.tar.xz"));
        assert_eq!(offered_name("attachment; filename=\"../../etc/passwd\"").as_deref(), Some("passwd"));
        assert_eq!(offered_name("attachment; filename=\"..\""), None);
        assert_eq!(offered_name(""), None);
    }
}
