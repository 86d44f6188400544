//! Files of guests and of custom volumes: whole files over HTTP (`lxc`, `pylxd`, Terraform), and SFTP (`incus file`).

use crate::{
    app::Call,
    request,
    respond::{Reply, empty, full, stream, sync},
    sftp::{self, Files, Opened, Write, Writer},
    socket,
    stream::Stream,
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Method, Response,
    body::Frame,
    header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue},
};
use karst_engine::{
    Context, Engine,
    compute::guest::{FileUpload, OpenFile},
    volumes::files::VolumeAt,
};
use karst_model::{
    Error, Result,
    guest::{FileInfo, FileKind, FileWrite},
};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

/// Bytes read at once.
const CHUNK: usize = 128 << 10;
/// Longest target of a symbolic link.
const LONGEST_TARGET: usize = 4096;

fn path(call: &Call) -> Result<String> {
    let path = call.query.get("path").ok_or_else(|| Error::invalid("path", "path is missing"))?;
    if path.contains('\0') {
        return Err(Error::invalid("path", "the path contains a NUL byte"));
    }
    Ok(sftp::absolute(path))
}

/// Whose files.
enum Whose {
    Instance(String),
    Volume { pool: String, name: String },
}

/// Where files are, and who asks for them.
pub struct Place {
    engine: Engine,
    context: Context,
    project: String,
    whose: Whose,
}

impl Place {
    fn new(call: &Call, whose: Whose) -> Self {
        Self {
            engine: call.engine().clone(),
            context: call.context.clone(),
            project: call.project().to_owned(),
            whose,
        }
    }

    /// Of `/1.0/instances/{name}/…`.
    fn instance(call: &Call) -> Self {
        Self::new(call, Whose::Instance(call.param(0).to_owned()))
    }

    /// Of `/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/…`.
    fn volume(call: &Call) -> Result<Self> {
        let (pool, kind, name) = (call.param(0), call.param(1), call.param(2));
        if kind != "custom" {
            let text = format!(
                "files of volumes of the type {kind:?} are not found here; those of instances are at /1.0/instances/NAME/files"
            );
            return Err(Error::not_found(text));
        }
        Ok(Self::new(call, Whose::Volume { pool: pool.to_owned(), name: name.to_owned() }))
    }

    fn at<'a>(&'a self, pool: &'a str, name: &'a str) -> VolumeAt<'a> {
        VolumeAt { project: &self.project, pool, name }
    }

    async fn open(&self, path: &str) -> Result<OpenFile> {
        let Self { engine, context, project, whose } = self;
        match whose {
            Whose::Instance(name) => engine.file_open(context, project, name, path).await,
            Whose::Volume { pool, name } => engine.volume_file_open(context, self.at(pool, name), path).await,
        }
    }

    async fn write(&self, write: FileWrite) -> Result<FileUpload> {
        let Self { engine, context, project, whose } = self;
        match whose {
            Whose::Instance(name) => engine.file_write(context, project, name, write).await,
            Whose::Volume { pool, name } => {
                engine.volume_file_write(context, self.at(pool, name), write).await
            }
        }
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let Self { engine, context, project, whose } = self;
        match whose {
            Whose::Instance(name) => engine.file_delete(context, project, name, path).await,
            Whose::Volume { pool, name } => {
                engine.volume_file_delete(context, self.at(pool, name), path).await
            }
        }
    }
}

fn word(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
    }
}

/// Sets what is known of a file, under the names that clients of Incus and of LXD read.
fn describe(reply: &mut Reply, info: &FileInfo) {
    let modified = jiff::Timestamp::from_second(info.modified).unwrap_or_default();
    let modified = modified.strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string();
    let all = [
        ("uid", info.uid.to_string()),
        ("gid", info.gid.to_string()),
        ("mode", format!("{:04o}", info.mode & 0o7777)),
        ("modified", modified),
        ("type", word(info.kind).to_owned()),
    ];
    for (name, value) in all {
        for prefix in ["x-incus-", "x-lxd-"] {
            if let (Ok(n), Ok(v)) =
                (HeaderName::from_bytes(format!("{prefix}{name}").as_bytes()), HeaderValue::from_str(&value))
            {
                reply.headers_mut().insert(n, v);
            }
        }
    }
}

/// `GET` and `HEAD /1.0/instances/{name}/files?path=…`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let place = Place::instance(&call);
    read(call, place).await
}

/// `GET` and `HEAD /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files?path=…`
///
/// # Errors
/// Those of the engine.
pub async fn volume_get(call: Call) -> Result<Reply> {
    let place = Place::volume(&call)?;
    read(call, place).await
}

async fn read(call: Call, place: Place) -> Result<Reply> {
    let path = path(&call)?;
    let head = call.request.method() == Method::HEAD;
    let file = place.open(&path).await?;
    let info = file.opened.info.clone();
    let mut reply = match info.kind {
        FileKind::Directory => sync(&file.opened.entries)?,
        _ => {
            let mut reply = match (info.kind, file.content) {
                (FileKind::Symlink, _) => Response::new(full(file.opened.target.clone().unwrap_or_default())),
                (_, Some(fd)) if !head => {
                    let frames = ReaderStream::with_capacity(Stream::new(fd)?, CHUNK).map_ok(Frame::data);
                    Response::new(stream(StreamBody::new(frames)))
                }
                _ => Response::new(full("")),
            };
            let headers = reply.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            let name: String = path
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .chars()
                .filter(|c| c.is_ascii_graphic() && *c != '"')
                .collect();
            if let Ok(v) = HeaderValue::from_str(&format!("inline;filename={name}")) {
                headers.insert(CONTENT_DISPOSITION, v);
            }
            // Files of /proc say 0 and have content: their length is not told.
            if info.kind == FileKind::File && (info.size > 0 || head) {
                headers.insert(CONTENT_LENGTH, HeaderValue::from(info.size));
            }
            reply
        }
    };
    if head {
        *reply.body_mut() = full("");
    }
    describe(&mut reply, &info);
    Ok(reply)
}

fn number(call: &Call, name: &str, radix: u32) -> Result<Option<u32>> {
    call.incus_header(name)
        .filter(|v| !v.is_empty())
        .map(|v| {
            u32::from_str_radix(v, radix).map_err(|_| {
                let kind = if radix == 8 { "an octal mode, such as 0644" } else { "an id" };
                Error::invalid(format!("X-Incus-{name}"), format!("{v:?} is not {kind}"))
            })
        })
        .transpose()
}

/// `POST /1.0/instances/{name}/files?path=…`
///
/// # Errors
/// Those of the engine; invalid headers.
pub async fn post(call: Call) -> Result<Reply> {
    let place = Place::instance(&call);
    written(call, place).await
}

/// `POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files?path=…`
///
/// # Errors
/// Those of the engine; invalid headers.
pub async fn volume_post(call: Call) -> Result<Reply> {
    let place = Place::volume(&call)?;
    written(call, place).await
}

async fn written(call: Call, place: Place) -> Result<Reply> {
    let path = path(&call)?;
    let kind = match call.incus_header("type").unwrap_or("file") {
        "file" | "" => FileKind::File,
        "directory" => FileKind::Directory,
        "symlink" => FileKind::Symlink,
        other => {
            return Err(Error::invalid(
                "X-Incus-type",
                format!("{other:?} is not a type; use file, directory or symlink"),
            ));
        }
    };
    let append = match call.incus_header("write").unwrap_or("overwrite") {
        "overwrite" | "" => false,
        "append" => true,
        other => {
            return Err(Error::invalid(
                "X-Incus-write",
                format!("{other:?} is neither overwrite nor append"),
            ));
        }
    };
    let (uid, gid, mode) = (number(&call, "uid", 10)?, number(&call, "gid", 10)?, number(&call, "mode", 8)?);
    let request = call.request;
    let mut write = FileWrite { path, kind, uid, gid, mode: mode.map(|m| m & 0o7777), append, target: None };
    if kind == FileKind::Symlink {
        let target = request::bytes(request.into_body(), LONGEST_TARGET).await?;
        let target = String::from_utf8(target.to_vec())
            .map_err(|_| Error::invalid("body", "the target of the link is not UTF-8"))?;
        write.target = Some(target);
        // A link's own bits mean nothing.
        write.mode = None;
        place.write(write).await?;
        return Ok(empty());
    }
    if kind == FileKind::Directory {
        place.write(write).await?;
        return Ok(empty());
    }
    let mut upload = place.write(write).await?;
    let sink = upload.sink.take();
    // The stream does not end before it is known that all of it came.
    let held = sink.as_ref().map(|sink| sink.try_clone()).transpose()?;
    let copied = copy_in(request.into_body(), sink).await;
    if copied.as_ref().is_err_and(|e| e.field.as_deref() == Some("body")) {
        upload.abandon().await;
        return copied.map(|()| empty());
    }
    drop(held);
    let finished = upload.finish().await;
    // Where both failed the guest knows why: a pipe that it closed is what its reason looks like from here.
    finished?;
    copied?;
    Ok(empty())
}

/// Copies a body into a descriptor and closes it.
pub(crate) async fn copy_in(
    mut body: request::RequestBody,
    sink: Option<std::os::fd::OwnedFd>,
) -> Result<()> {
    let fd =
        sink.ok_or_else(|| Error::internal("the file could not be written", "no stream for a regular file"))?;
    let mut sink = Stream::new(fd)?;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| Error::invalid("body", "the body of the request broke off").with_context(e))?;
        if let Ok(data) = frame.into_data() {
            sink.write_all(&data).await?;
        }
    }
    sink.flush().await?;
    Ok(())
}

/// `DELETE /1.0/instances/{name}/files?path=…`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    Place::instance(&call).delete(&path(&call)?).await?;
    Ok(empty())
}

/// `DELETE /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files?path=…`
///
/// # Errors
/// Those of the engine.
pub async fn volume_delete(call: Call) -> Result<Reply> {
    Place::volume(&call)?.delete(&path(&call)?).await?;
    Ok(empty())
}

struct Upload {
    sink: Option<Stream>,
    upload: Option<FileUpload>,
    /// Why no more is taken. Clients have several parts on their way at once, and show what the last of them was told.
    failed: Option<Error>,
}

impl Upload {
    fn closed(&self) -> Error {
        self.failed.clone().unwrap_or_else(|| Error::conflict("the file is closed"))
    }
}

impl Drop for Upload {
    /// Of a session that broke off.
    fn drop(&mut self) {
        if let (Some(sink), Some(upload)) = (self.sink.take(), self.upload.take()) {
            tokio::spawn(async move {
                upload.abandon().await;
                drop(sink);
            });
        }
    }
}

#[async_trait]
impl Write for Upload {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        match &mut self.sink {
            Some(sink) => match sink.write_all(data).await {
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                    self.sink = None;
                    match &mut self.upload {
                        Some(upload) => {
                            let why = upload.failure().await;
                            self.failed = Some(why.clone());
                            Err(why)
                        }
                        None => Err(self.closed()),
                    }
                }
                written => Ok(written?),
            },
            None => Err(self.closed()),
        }
    }
    async fn finish(mut self: Box<Self>) -> Result<()> {
        if let Some(mut sink) = self.sink.take() {
            sink.flush().await?;
        }
        match (self.upload.take(), self.failed.take()) {
            (Some(upload), Some(why)) => upload.finish().await.and(Err(why)),
            (Some(upload), None) => upload.finish().await,
            (None, _) => Err(Error::conflict("the file is closed")),
        }
    }
}

#[async_trait]
impl Files for Place {
    async fn open(&self, path: &str) -> Result<Opened> {
        let file = Self::open(self, path).await?;
        let content = file.content.map(Stream::new).transpose()?;
        Ok(Opened {
            info: file.opened.info,
            entries: file.opened.entries,
            target: file.opened.target,
            content: content.map(|c| -> sftp::Reader { Box::pin(c) }),
        })
    }

    async fn write(&self, write: FileWrite) -> Result<Option<Writer>> {
        let regular = write.kind == FileKind::File;
        let mut upload = Self::write(self, write).await?;
        if !regular {
            upload.finish().await?;
            return Ok(None);
        }
        let sink = upload.sink.take().map(Stream::new).transpose()?;
        Ok(Some(Box::new(Upload { sink, upload: Some(upload), failed: None })))
    }

    async fn delete(&self, path: &str) -> Result<()> {
        Self::delete(self, path).await
    }
}

/// `GET /1.0/instances/{name}/sftp` with `Upgrade: sftp`
///
/// # Errors
/// Those of the engine.
pub async fn sftp(call: Call) -> Result<Reply> {
    let place = Place::instance(&call);
    session(call, place).await
}

/// `GET /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/sftp` with `Upgrade: sftp`
///
/// # Errors
/// Those of the engine.
pub async fn volume_sftp(call: Call) -> Result<Reply> {
    let place = Place::volume(&call)?;
    session(call, place).await
}

async fn session(call: Call, place: Place) -> Result<Reply> {
    // Looks at the root first, so that a wrong name or a stopped guest is an answer rather than a broken stream.
    place.open("/").await?;
    socket::raw(call.request, "sftp", |io| async move {
        if let Err(e) = sftp::serve(io, &place).await {
            tracing::debug!(error = %e, "an SFTP session ended badly");
        }
    })
}

/// Joins byte streams of several descriptors into a body.
pub(crate) fn frames(
    parts: Vec<std::result::Result<Bytes, Stream>>,
) -> impl hyper::body::Body<Data = Bytes, Error = std::io::Error> + Send + 'static {
    let streams = parts.into_iter().map(|part| match part {
        Ok(bytes) => futures::stream::once(async move { Ok(bytes) }).boxed(),
        Err(source) => ReaderStream::with_capacity(source, CHUNK).boxed(),
    });
    StreamBody::new(futures::stream::iter(streams).flatten().map_ok(Frame::data))
}
