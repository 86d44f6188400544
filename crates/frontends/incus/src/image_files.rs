//! The files of an image as the body of a request or an answer: one as it is, two as a multipart form.

use crate::{
    handlers::files::frames,
    respond::{Body, stream},
    stream::Stream,
};
use bytes::Bytes;
use karst_engine::images::{ImageFile, ImagePart};
use karst_model::{Error, Result};
use std::os::fd::OwnedFd;

/// The body, and what is to be said of it.
pub(crate) struct Content {
    pub content_type: String,
    /// Bytes, and the name of the only file.
    pub single: Option<(u64, String)>,
    pub body: Body,
}

/// Takes the files in the order of the fingerprint.
///
/// # Errors
/// Not found, when there are none.
pub(crate) fn content(files: Vec<(ImageFile, OwnedFd)>) -> Result<Content> {
    if files.len() == 1 {
        let Some((file, fd)) = files.into_iter().next() else {
            return Err(Error::not_found("the image has no files"));
        };
        return Ok(Content {
            content_type: "application/octet-stream".into(),
            single: Some((file.size, file.filename)),
            body: stream(frames(vec![Err(Stream::new(fd)?)])),
        });
    }
    if files.is_empty() {
        return Err(Error::not_found("the image has no files"));
    }
    let boundary = uuid::Uuid::new_v4().simple().to_string();
    let mut parts = vec![];
    for (n, (file, fd)) in files.into_iter().enumerate() {
        let name = match file.part {
            ImagePart::Metadata | ImagePart::Unified => "metadata",
            ImagePart::Rootfs => "rootfs",
            ImagePart::Disk => "rootfs.img",
        };
        let filename = if file.part == ImagePart::Metadata && !file.filename.starts_with("meta-") {
            format!("meta-{}", file.filename)
        } else {
            file.filename
        };
        let start = if n == 0 { "" } else { "\r\n" };
        let head = format!(
            "{start}--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{filename}\"\r\nContent-Type: application/octet-stream\r\n\r\n"
        );
        parts.push(Ok(Bytes::from(head)));
        parts.push(Err(Stream::new(fd)?));
    }
    parts.push(Ok(Bytes::from(format!("\r\n--{boundary}--\r\n"))));
    Ok(Content {
        content_type: format!("multipart/form-data; boundary={boundary}"),
        single: None,
        body: stream(frames(parts)),
    })
}
