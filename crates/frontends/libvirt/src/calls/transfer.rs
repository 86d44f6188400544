//! The bytes of volumes as streams: up and down, with holes where both sides know of them.

use super::{
    Answered,
    power::ended,
    storage::{Found, VolumeName, volume},
    volumes::{failed, own},
};
use crate::{
    error::{Code, VirError},
    frame::{Frame, Header, Kind, Status},
    session::{Answer, Call, Input, Session, StreamInput},
    xdr::Writer,
    xml::storage::is_image,
};
use bytes::Bytes;
use karst_engine::{
    compute::guest::Session as Held,
    stream::FdStream,
    volumes::content::{ImageOfVolume, OpenVolume, WriteVolume, most_of_image},
};
use karst_model::{BackupId, Error};
use rustix::{
    fs::{SeekFrom, fstatvfs, seek},
    io::Errno,
};
use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};
use tokio::io::AsyncReadExt;

/// `VIR_STORAGE_VOL_{UPLOAD,DOWNLOAD}_SPARSE_STREAM`
const SPARSE: u32 = 1;
/// Most bytes of a stream's frame that every client takes.
const FRAME: usize = 262_120;
/// Bytes that are read at a time.
const READ: u64 = 4 * FRAME as u64;

/// Bytes of the host's disk that uploads leave free, as those of images do.
const RESERVE: u64 = 512 << 20;

/// A stream of ours is at its end: says so, and waits for the client's word.
pub(super) async fn sent(
    session: &Session,
    header: Header,
    input: &mut Input,
    outcome: Result<(), VirError>,
) {
    match outcome {
        Err(e) => session.send(Frame::new(header.stream(Status::Error), e.encode())).await,
        Ok(()) => {
            // Finished or given up; either is answered, and nothing else comes.
            let ended = tokio::select! {
                input = input.recv() => input.is_some(),
                () = session.ended() => false,
            };
            if ended {
                session.send(Frame::new(header.stream(Status::Ok), Bytes::new())).await;
            }
        }
    }
    session.stream_ended(header);
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, VirError> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|e| Error::internal("a task ended unexpectedly", e))?;
    Ok(done.map_err(Error::from)?)
}

type Arguments = (VolumeName, u64, u64, u32);

fn arguments(call: &Call) -> Result<Arguments, VirError> {
    let arguments = call.arguments(|r| Ok((VolumeName::read(r)?, r.u64()?, r.u64()?, r.u32()?)))?;
    call.known_flags(arguments.3, SPARSE)?;
    Ok(arguments)
}

/// `STORAGE_VOL_DOWNLOAD`
pub async fn download(call: Call) -> Answered {
    let (named, offset, length, flags) = arguments(&call)?;
    let found = volume(&call, &named)?;
    own(&found)?;
    if is_image(&found.volume) {
        return download_image(&call, &found, (offset, length)).await;
    }
    let session = &call.session;
    let (engine, context, project) = (&session.front.engine, &session.context, &call.opened()?.project);
    let OpenVolume { file, session: held, reading } =
        engine.volume_open(context, project, &found.pool, &found.name).await?;
    let file = Arc::new(File::from(file));
    // Of a block device too.
    let size = seek(&*file, SeekFrom::End(0)).map_err(|e| Error::from(io::Error::from(e)))?;
    if offset > size {
        let text = format!("the offset {offset} is beyond the end of the volume at {size}");
        return Err(failed(Code::InvalidArg, text));
    }
    let end = if length == 0 { size } else { offset.saturating_add(length).min(size) };
    let mut input = session.stream(call.header)?;
    let (session, header) = (session.clone(), call.header);
    let then = async move {
        let outcome = tokio::select! {
            outcome = pour(&session, header, file, (offset, end), flags & SPARSE != 0) => outcome,
            // Nothing but an end can come; it is answered below.
            given_up = input.recv() => {
                drop((held, reading));
                if given_up.is_some() {
                    session.send(Frame::new(header.stream(Status::Ok), Bytes::new())).await;
                }
                session.stream_ended(header);
                return;
            }
            () = session.ended() => Ok(()),
        };
        drop((held, reading));
        sent(&session, header, &mut input, outcome).await;
    };
    Ok(Answer { payload: vec![], fds: vec![], then: Some(Box::pin(then)) })
}

/// The same as an image, which is made for it: what is before the offset is passed over.
async fn download_image(call: &Call, found: &Found, range: (u64, u64)) -> Answered {
    let session = &call.session;
    let (engine, context, project) = (&session.front.engine, &session.context, &call.opened()?.project);
    let ImageOfVolume { stream, session: held, reading } =
        engine.volume_image(context, project, &found.pool, &found.name).await?;
    let stream = FdStream::new(stream).map_err(Error::from)?;
    let mut input = session.stream(call.header)?;
    let (session, header) = (session.clone(), call.header);
    let then = async move {
        let outcome = tokio::select! {
            outcome = pour_image(&session, header, stream, range, &held) => outcome,
            // Nothing but an end can come; it is answered below.
            given_up = input.recv() => {
                drop((held, reading));
                if given_up.is_some() {
                    session.send(Frame::new(header.stream(Status::Ok), Bytes::new())).await;
                }
                session.stream_ended(header);
                return;
            }
            () = session.ended() => Ok(()),
        };
        drop((held, reading));
        sent(&session, header, &mut input, outcome).await;
    };
    Ok(Answer { payload: vec![], fds: vec![], then: Some(Box::pin(then)) })
}

async fn pour_image(
    session: &Session,
    header: Header,
    mut stream: FdStream,
    (offset, length): (u64, u64),
    held: &Held,
) -> Result<(), VirError> {
    let mut before = offset;
    let mut left = if length == 0 { u64::MAX } else { length };
    let mut buffer = vec![0; FRAME];
    let ended = loop {
        let n = stream.read(&mut buffer).await.map_err(Error::from)?;
        if n == 0 {
            break true;
        }
        let skipped = before.min(n as u64);
        before -= skipped;
        let part = &buffer[skipped as usize..n];
        let part = &part[..part.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
        left -= part.len() as u64;
        if !part.is_empty() {
            let part = Bytes::copy_from_slice(part);
            session.send(Frame::new(header.stream(Status::Continue), part)).await;
        }
        if left == 0 {
            break false;
        }
    };
    if ended {
        // So it is whole, or not.
        match held.wait().await? {
            0 if before == 0 => {}
            0 => {
                let text = format!("the offset {offset} is beyond the end of the image");
                return Err(failed(Code::InvalidArg, text));
            }
            _ => return Err(failed(Code::OperationFailed, "the image could not be made")),
        }
    }
    // An empty one is the end.
    session.send(Frame::new(header.stream(Status::Continue), Bytes::new())).await;
    Ok(())
}

/// What comes next of a disk.
enum Piece {
    Data(Vec<u8>),
    Hole(u64),
}

/// The next piece of a disk from `at` on, before `end`.
fn next(file: &File, at: u64, end: u64, sparse: bool) -> io::Result<Piece> {
    let mut stop = end;
    if sparse {
        match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data > at => return Ok(Piece::Hole(data.min(end) - at)),
            Ok(_) => stop = seek(file, SeekFrom::Hole(at))?.min(end),
            Err(Errno::NXIO) => return Ok(Piece::Hole(end - at)),
            // A device, which has no holes.
            Err(Errno::INVAL) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut data = vec![0; (stop - at).min(READ) as usize];
    file.read_exact_at(&mut data, at)?;
    Ok(Piece::Data(data))
}

async fn pour(
    session: &Session,
    header: Header,
    file: Arc<File>,
    (mut at, end): (u64, u64),
    sparse: bool,
) -> Result<(), VirError> {
    while at < end {
        let of = file.clone();
        match blocking(move || next(&of, at, end, sparse)).await? {
            Piece::Hole(length) => {
                at += length;
                let mut w = Writer::new();
                w.u64(length).u32(0);
                let header = Header { kind: Kind::StreamHole, ..header.stream(Status::Continue) };
                session.send(Frame::new(header, w.finish())).await;
            }
            Piece::Data(data) => {
                at += data.len() as u64;
                let data = Bytes::from(data);
                for start in (0..data.len()).step_by(FRAME) {
                    let part = data.slice(start..data.len().min(start + FRAME));
                    session.send(Frame::new(header.stream(Status::Continue), part)).await;
                }
            }
        }
    }
    // An empty one is the end.
    session.send(Frame::new(header.stream(Status::Continue), Bytes::new())).await;
    Ok(())
}

/// `STORAGE_VOL_UPLOAD`: what comes is kept aside, and put in place when the client has finished.
pub async fn upload(call: Call) -> Answered {
    let (named, offset, length, _) = arguments(&call)?;
    let found = volume(&call, &named)?;
    own(&found)?;
    let session = call.session.clone();
    let project = call.opened()?.project.clone();
    let (engine, context) = (&session.front.engine, &session.context);
    let image = is_image(&found.volume);
    if image && offset > 0 {
        let text = format!("volume '{}' takes an image in the format qcow2 as a whole", found.name);
        return Err(failed(Code::OperationUnsupported, text));
    }
    let part = if image { (0, 0) } else { (offset, length) };
    engine.volume_writable(context, &project, &found.pool, &found.name, part)?;
    let size = found.volume.size.unwrap_or_default();
    let stored = found.volume.stored_size().unwrap_or_default().bytes();
    let most = if image { most_of_image(size) } else { stored.saturating_sub(offset) };
    let room = match length {
        0 => most,
        length if image && length > most => {
            let text = format!("an image of a disk of {} bytes has no more than {most}", size.bytes());
            return Err(failed(Code::InvalidArg, text));
        }
        length => length,
    };
    let held = engine.volume_upload(context, &project, room)?;
    let upload = held.id();
    let (mut input, header) = (session.upload(call.header)?, call.header);
    let file = match engine.backup_upload_open(context, &project, upload).await {
        Ok(file) => Arc::new(File::from(file)),
        Err(e) => {
            session.stream_ended(header);
            return Err(e.into());
        }
    };
    let then = async move {
        let (engine, context) = (&session.front.engine, &session.context);
        let (came, gone) = tokio::select! {
            came = take(&mut input, &file, room) => (came, false),
            () = session.ended() => (Ok(None), true),
        };
        drop(file);
        let outcome = match came {
            Ok(Some(length)) if length > 0 => {
                let request = WriteVolume { upload, length, offset, image };
                match engine.volume_write(context, &project, &found.pool, &found.name, request).await {
                    Ok(operation) => ended(operation).await,
                    Err(e) => abandoned(&session, upload, Err(e.into())).await,
                }
            }
            other => abandoned(&session, upload, other.map(drop)).await,
        };
        drop((held, input));
        // Who lost something of it, or the connection, has been told or is gone.
        if !session.stream_ended(header) || gone {
            return;
        }
        let frame = match outcome {
            Ok(()) => Frame::new(header.stream(Status::Ok), Bytes::new()),
            Err(e) => Frame::new(header.stream(Status::Error), e.encode()),
        };
        session.send(frame).await;
    };
    Ok(Answer { payload: vec![], fds: vec![], then: Some(Box::pin(then)) })
}

async fn abandoned<T>(session: &Session, upload: BackupId, outcome: T) -> T {
    session.front.engine.backup_upload_abandon(upload).await;
    outcome
}

/// Bytes that are free where a file lies, as far as its file system counts them.
fn left(file: &File) -> io::Result<u64> {
    let found = fstatvfs(file)?;
    Ok(if found.f_blocks == 0 { u64::MAX } else { found.f_bavail.saturating_mul(found.f_frsize) })
}

/// Writes what comes into a file; answers its length, or nothing when the client gave up.
async fn take(input: &mut Input, file: &Arc<File>, room: u64) -> Result<Option<u64>, VirError> {
    let mut at = 0u64;
    let mut grow = |length: u64| {
        let start = at;
        at = at.checked_add(length).filter(|end| *end <= room).ok_or_else(|| {
            failed(Code::InvalidArg, format!("what was sent is larger than the {room} bytes that there are"))
        })?;
        Ok::<u64, VirError>(start)
    };
    let length = loop {
        match input.recv().await {
            Some(StreamInput::Data(data)) => {
                let (start, file) = (grow(data.len() as u64)?, file.clone());
                let full = blocking(move || match left(&file)? < RESERVE {
                    true => Ok(true),
                    false => file.write_all_at(&data, start).map(|()| false),
                });
                if full.await? {
                    let text = format!(
                        "the host's disk has no more than {} MiB free, which uploads leave",
                        RESERVE >> 20
                    );
                    return Err(failed(Code::OperationFailed, text));
                }
            }
            Some(StreamInput::Hole(length)) => {
                grow(length)?;
            }
            Some(StreamInput::Finish) => break grow(0)?,
            Some(StreamInput::Abort) => return Ok(None),
            // What came is not all that was sent.
            None => {
                return Err(failed(
                    Code::OperationAborted,
                    "the stream ended before the upload was finished",
                ));
            }
        }
    };
    let file = file.clone();
    blocking(move || file.set_len(length)).await?;
    Ok(Some(length))
}
