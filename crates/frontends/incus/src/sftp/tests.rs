//! The protocol by its packets, also malformed ones, over files in memory.

use super::{Files, Opened, Reader, Write, Writer, packet::request, serve};
use async_trait::async_trait;
use karst_model::{
    Error, Result,
    guest::{FileInfo, FileKind, FileWrite},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

#[derive(Clone)]
struct File {
    kind: FileKind,
    mode: u32,
    uid: u32,
    data: Vec<u8>,
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<BTreeMap<String, File>>>);

struct Writing {
    files: Memory,
    path: String,
    data: Vec<u8>,
    /// What was there goes, once this is whole.
    replaces: bool,
}

#[async_trait]
impl Write for Writing {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.data.extend_from_slice(data);
        Ok(())
    }
    async fn finish(self: Box<Self>) -> Result<()> {
        if let Some(file) = self.files.0.lock().unwrap().get_mut(&self.path) {
            if self.replaces {
                file.data.clear();
            }
            file.data.extend_from_slice(&self.data);
        }
        Ok(())
    }
}

#[async_trait]
impl Files for Memory {
    async fn open(&self, path: &str) -> Result<Opened> {
        let files = self.0.lock().unwrap();
        let file = files.get(path).cloned().ok_or_else(|| Error::not_found("no such file"))?;
        let below = if path == "/" { "/".to_owned() } else { format!("{path}/") };
        let entries = files
            .keys()
            .filter_map(|p| p.strip_prefix(&below))
            .filter(|p| !p.is_empty() && !p.contains('/'))
            .map(str::to_owned)
            .collect();
        let content: Option<Reader> = match file.kind {
            FileKind::File => Some(Box::pin(std::io::Cursor::new(file.data.clone()))),
            _ => None,
        };
        let target = (file.kind == FileKind::Symlink).then(|| String::from_utf8(file.data.clone()).unwrap());
        let info = FileInfo {
            kind: file.kind,
            uid: file.uid,
            gid: 0,
            mode: file.mode,
            size: file.data.len() as u64,
            modified: 0,
        };
        Ok(Opened { info, entries, target, content })
    }

    async fn write(&self, write: FileWrite) -> Result<Option<Writer>> {
        let mut files = self.0.lock().unwrap();
        let new = File { kind: write.kind, mode: 0o644, uid: 0, data: vec![] };
        let file = files.entry(write.path.clone()).or_insert(new);
        file.mode = write.mode.unwrap_or(file.mode);
        file.uid = write.uid.unwrap_or(file.uid);
        if let Some(target) = write.target {
            file.data = target.into_bytes();
        }
        drop(files);
        if write.kind != FileKind::File {
            return Ok(None);
        }
        let replaces = !write.append;
        Ok(Some(Box::new(Writing { files: self.clone(), path: write.path, data: vec![], replaces })))
    }

    async fn delete(&self, path: &str) -> Result<()> {
        self.0.lock().unwrap().remove(path).map(drop).ok_or_else(|| Error::not_found("no such file"))
    }
}

struct Client {
    stream: DuplexStream,
    files: Memory,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
}

fn string(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u32).to_be_bytes()[..], s].concat()
}

impl Client {
    fn new() -> Self {
        let files = Memory::default();
        let root = File { kind: FileKind::Directory, mode: 0o755, uid: 0, data: vec![] };
        files.0.lock().unwrap().insert("/".into(), root);
        let (stream, far) = tokio::io::duplex(1 << 20);
        let of = files.clone();
        let served = tokio::spawn(async move { serve(far, &of).await });
        Self { stream, files, served }
    }

    /// Sends a request and answers type and rest of what comes back.
    async fn ask(&mut self, kind: u8, fields: &[Vec<u8>]) -> (u8, Vec<u8>) {
        let body: Vec<u8> =
            [vec![kind], 9u32.to_be_bytes().to_vec()].concat().into_iter().chain(fields.concat()).collect();
        self.stream.write_all(&string(&body)).await.unwrap();
        let n = self.stream.read_u32().await.unwrap() as usize;
        let mut answer = vec![0; n];
        self.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer[1..5], &9u32.to_be_bytes(), "the answer carries the request's id");
        (answer[0], answer[5..].to_vec())
    }

    /// The code of a status answer.
    async fn status(&mut self, kind: u8, fields: &[Vec<u8>]) -> u32 {
        let (kind, rest) = self.ask(kind, fields).await;
        assert_eq!(kind, 101);
        u32::from_be_bytes(rest[..4].try_into().unwrap())
    }

    async fn open(&mut self, path: &str, flags: u32) -> Vec<u8> {
        let fields = [string(path.as_bytes()), flags.to_be_bytes().to_vec(), vec![0; 4]];
        let (kind, rest) = self.ask(request::OPEN, &fields).await;
        assert_eq!(kind, 102, "{}", String::from_utf8_lossy(&rest));
        rest
    }
}

const WRITE_CREATE_TRUNCATE: u32 = 2 | 8 | 16;

fn offset(n: u64) -> Vec<u8> {
    n.to_be_bytes().to_vec()
}

#[tokio::test]
async fn a_file_is_written_changed_and_read() {
    let mut c = Client::new();
    let handle = c.open("/a/../f", WRITE_CREATE_TRUNCATE).await;
    assert_eq!(c.status(request::WRITE, &[handle.clone(), offset(0), string(b"hello ")]).await, 0);
    // Its attributes are set while it is open, as Incus' client does; then it goes on.
    let attributes =
        [vec![0, 0, 0, 6], 5u32.to_be_bytes().to_vec(), vec![0; 4], 0o100_600u32.to_be_bytes().to_vec()];
    assert_eq!(c.status(request::SETSTAT, &[string(b"/f"), attributes.concat()]).await, 0);
    assert_eq!(c.status(request::WRITE, &[handle.clone(), offset(6), string(b"world")]).await, 0);
    assert_eq!(
        c.status(request::WRITE, &[handle.clone(), offset(99), string(b"!")]).await,
        8,
        "a jump is refused"
    );
    assert_eq!(c.status(request::CLOSE, std::slice::from_ref(&handle)).await, 0);
    assert_eq!(c.status(request::CLOSE, &[handle]).await, 4, "a handle closes once");
    {
        let files = c.files.0.lock().unwrap();
        assert_eq!(
            (&files["/f"].data[..], files["/f"].mode, files["/f"].uid),
            (&b"hello world"[..], 0o600, 5)
        );
    }
    let handle = c.open("/f", 1).await;
    let (kind, data) = c.ask(request::READ, &[handle.clone(), offset(6), vec![0, 0, 0, 100]]).await;
    assert_eq!((kind, &data[4..]), (103, &b"world"[..]));
    assert_eq!(c.status(request::READ, &[handle.clone(), offset(11), vec![0, 0, 0, 100]]).await, 1);
    let (kind, data) = c.ask(request::READ, &[handle, offset(0), vec![0, 0, 0, 5]]).await;
    assert_eq!((kind, &data[4..]), (103, &b"hello"[..]), "reading can begin again");
    assert_eq!(
        c.status(request::OPEN, &[string(b"/f"), 0x2au32.to_be_bytes().to_vec(), vec![0; 4]]).await,
        4,
        "exclusive"
    );
    assert_eq!(c.status(request::OPEN, &[string(b"/x"), vec![0, 0, 0, 1], vec![0; 4]]).await, 2);
    assert_eq!(c.status(request::RMDIR, &[string(b"/f")]).await, 4, "not a directory");
    assert_eq!(c.status(request::REMOVE, &[string(b"/f")]).await, 0);
    assert_eq!(c.status(request::REMOVE, &[string(b"/f")]).await, 2);
}

#[tokio::test]
async fn a_client_that_is_killed_leaves_the_file_that_was_there() {
    let mut c = Client::new();
    let handle = c.open("/f", WRITE_CREATE_TRUNCATE).await;
    assert_eq!(c.status(request::WRITE, &[handle.clone(), offset(0), string(b"the old one")]).await, 0);
    assert_eq!(c.status(request::CLOSE, &[handle]).await, 0);
    let handle = c.open("/f", WRITE_CREATE_TRUNCATE).await;
    assert_eq!(c.status(request::WRITE, &[handle, offset(0), string(b"the n")]).await, 0);
    // It ends where a packet does, as nearly always when a client is killed.
    let Client { stream, files, served } = c;
    drop(stream);
    served.await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&files.0.lock().unwrap()["/f"].data), "the old one");
}

#[tokio::test]
async fn directories_and_links() {
    let mut c = Client::new();
    assert_eq!(c.status(request::MKDIR, &[string(b"/d"), vec![0; 4]]).await, 0);
    assert_eq!(c.status(request::MKDIR, &[string(b"/d"), vec![0; 4]]).await, 4, "it exists");
    assert_eq!(c.status(request::SYMLINK, &[string(b"d"), string(b"/l")]).await, 0);
    let (kind, rest) = c.ask(request::READLINK, &[string(b"/l")]).await;
    assert!(
        kind == 104 && rest.ends_with(&[vec![0, 0, 0, 1], b"d".to_vec(), vec![0; 4]].concat()[4..]),
        "{rest:?}"
    );
    let (kind, rest) = c.ask(request::STAT, &[string(b"/l")]).await;
    assert_eq!(
        (kind, u32::from_be_bytes(rest[20..24].try_into().unwrap()) & 0o170_000),
        (105, 0o040_000),
        "followed"
    );
    let (_, rest) = c.ask(request::LSTAT, &[string(b"/l")]).await;
    assert_eq!(u32::from_be_bytes(rest[20..24].try_into().unwrap()) & 0o170_000, 0o120_000);
    let (_, handle) = c.ask(request::OPENDIR, &[string(b"/")]).await;
    let (kind, rest) = c.ask(request::READDIR, std::slice::from_ref(&handle)).await;
    assert_eq!((kind, &rest[..4]), (104, &[0, 0, 0, 2][..]));
    assert_eq!(c.status(request::READDIR, &[handle]).await, 1);
    // A link to itself ends.
    assert_eq!(c.status(request::SYMLINK, &[string(b"loop"), string(b"/loop")]).await, 0);
    assert_eq!(c.status(request::STAT, &[string(b"/loop")]).await, 4);
}

#[tokio::test]
async fn nonsense_is_answered_or_ends_the_session() {
    let mut c = Client::new();
    assert_eq!(c.status(request::OPEN, &[vec![0, 0, 0, 99]]).await, 5, "a text that is shorter than it says");
    assert_eq!(c.status(request::STAT, &[string(b"\xff\xfe")]).await, 5, "no UTF-8");
    assert_eq!(c.status(request::STAT, &[string(b"/a\0b")]).await, 5, "a NUL byte");
    assert_eq!(c.status(200, &[]).await, 8, "an extension");
    assert_eq!(c.status(request::READ, &[string(b"77"), offset(0), vec![0; 4]]).await, 4, "no such handle");
    c.stream.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
    assert!(c.served.await.unwrap().is_err(), "an impossible size ends the session");
}
