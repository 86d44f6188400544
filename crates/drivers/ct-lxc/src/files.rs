//! Files inside, running or not.

use crate::{attach::Helper, driver::LxcDriver};
use async_trait::async_trait;
use karst_guest::{FileInfo, FileKind, FileWrite, GuestFiles, OpenedFile};
use karst_keeper::attach::{Operation, Request};
use karst_model::{Error, InstanceId, Result};
use rustix::fs::{Mode, OFlags};
use std::{io::Read, io::Seek, os::fd::OwnedFd, path::Path, time::Duration};

/// Content may be large and its source slow.
const WRITE: Duration = Duration::from_secs(3600);

impl LxcDriver {
    /// A helper for a file operation: inside when it runs, on `root` when not.
    async fn file_helper(
        &self,
        instance: InstanceId,
        root: Option<&Path>,
        mut request: Request,
        content: Option<OwnedFd>,
    ) -> Result<Helper> {
        if !request.path.as_encoded_bytes().starts_with(b"/") {
            return Err(Error::invalid("path", "must be absolute"));
        }
        if request.path.as_encoded_bytes().contains(&0) || request.target.as_encoded_bytes().contains(&0) {
            return Err(Error::invalid("path", "must not contain NUL"));
        }
        let rest = content.into_iter().collect();
        let subject = match self.init(instance).await {
            Ok((_, init)) => {
                request.pid = init.pid;
                init.pidfd
            }
            Err(e) if e.is(karst_model::ErrorKind::NotFound) => {
                let Some(root) = root else {
                    return Err(e);
                };
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(root, flags, Mode::empty()).map_err(std::io::Error::from)?
            }
            Err(e) => return Err(e),
        };
        Helper::start(self.daemon_id(), &instance.to_string(), &request, subject, rest).await
    }
}

#[async_trait]
impl GuestFiles for LxcDriver {
    async fn open(&self, instance: InstanceId, root: Option<&Path>, path: &str) -> Result<OpenedFile> {
        let request = Request { operation: Operation::Open, path: path.into(), ..Request::default() };
        let mut helper = self.file_helper(instance, root, request, None).await?;
        let (body, fd) = helper.reply().await?;
        let malformed = || Error::internal("the file could not be opened", "malformed reply");
        let end = body.iter().position(|b| *b == b'\n').unwrap_or(body.len());
        let head = std::str::from_utf8(&body[..end]).map_err(|_| malformed())?;
        let fields: Vec<&str> = head.split(' ').collect();
        let [kind, uid, gid, mode, size, modified] = fields.as_slice() else {
            return Err(malformed());
        };
        let number = |s: &str| s.parse::<i64>().map_err(|_| malformed());
        let info = FileInfo {
            kind: match *kind {
                "file" => FileKind::File,
                "directory" => FileKind::Directory,
                _ => FileKind::Symlink,
            },
            uid: number(uid)? as u32,
            gid: number(gid)? as u32,
            mode: number(mode)? as u32,
            size: number(size)? as u64,
            modified: number(modified)?,
        };
        let mut opened = OpenedFile { content: None, entries: vec![], target: None, info };
        match opened.info.kind {
            FileKind::File => {
                opened.content = Some(fd.ok_or_else(malformed)?);
                // It may have to go on reading for us, into a pipe whose other end we now hold.
                helper.release();
            }
            FileKind::Directory => {
                let mut list = std::fs::File::from(fd.ok_or_else(malformed)?);
                let mut names = vec![];
                list.rewind()?;
                list.read_to_end(&mut names)?; // a memory file
                opened.entries = names
                    .split(|b| *b == 0)
                    .filter(|n| !n.is_empty())
                    .map(|n| String::from_utf8_lossy(n).into_owned())
                    .collect();
            }
            FileKind::Symlink => {
                opened.target =
                    Some(String::from_utf8_lossy(body.get(end + 1..).unwrap_or_default()).into_owned());
            }
        }
        Ok(opened)
    }

    async fn write(
        &self,
        instance: InstanceId,
        root: Option<&Path>,
        request: FileWrite,
        content: Option<OwnedFd>,
    ) -> Result<()> {
        let wire = Request {
            operation: match request.kind {
                FileKind::File => Operation::WriteFile,
                FileKind::Directory => Operation::WriteDirectory,
                FileKind::Symlink => Operation::WriteSymlink,
            },
            path: request.path.into(),
            uid: request.uid,
            gid: request.gid,
            mode: request.mode,
            append: request.append,
            target: request.target.unwrap_or_default().into(),
            ..Request::default()
        };
        if wire.operation == Operation::WriteSymlink && wire.target.is_empty() {
            return Err(Error::invalid("target", "a symbolic link needs a target"));
        }
        let helper = self.file_helper(instance, root, wire, content).await?;
        helper.reply_within(WRITE).await.map(drop)
    }

    async fn delete(&self, instance: InstanceId, root: Option<&Path>, path: &str) -> Result<()> {
        let request = Request { operation: Operation::Delete, path: path.into(), ..Request::default() };
        let helper = self.file_helper(instance, root, request, None).await?;
        helper.reply().await.map(drop)
    }
}
