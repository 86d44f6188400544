//! Files inside a guest by the QEMU guest agent: content by `guest-file-*`, everything else by small programs of the guest.
//!
//! Needs `sh`, `stat`, `find`, `readlink`, `mkdir`, `ln`, `chmod`, `chown` in the guest (coreutils or busybox). Paths are
//! arguments, never part of a script's text. Links are followed by the guest's own kernel, so never out of its root.

use crate::agent::{Agent, Ended};
use base64::{Engine, prelude::BASE64_STANDARD};
use karst_guest::{FileInfo, FileKind, FileWrite, OpenedFile};
use karst_model::{Error, Result};
use serde_json::{Value, json};
use std::{os::fd::OwnedFd, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
};

/// Bytes moved by one call.
const CHUNK: usize = 256 << 10;
/// How long one call may take.
const CALL: Duration = Duration::from_secs(30);

/// First line: raw mode in hexadecimal, owner, group, size, modified. Then a link's target or a directory's names, each
/// ended by NUL.
const LOOK: &str = r#"[ -e "$1" ] || [ -L "$1" ] || exit 44
stat -c '%f %u %g %s %Y' -- "$1" || exit 1
if [ -L "$1" ]; then readlink -n -- "$1"
elif [ -d "$1" ]; then cd -- "$1" && find . ! -name . -prune -print0; fi"#;
const MAKE_DIRECTORY: &str =
    r#"[ -d "$1" ] && exit 0; [ -e "$1" ] && exit 45; [ -d "$(dirname -- "$1")" ] || exit 44; mkdir -- "$1""#;
const MAKE_LINK: &str =
    r#"[ -e "$1" ] || [ -L "$1" ] && exit 45; [ -d "$(dirname -- "$1")" ] || exit 44; ln -s -- "$2" "$1""#;
/// 3: it is there, 0: it may be made.
const BEFORE_WRITE: &str =
    r#"[ -d "$1" ] && exit 46; [ -e "$1" ] && exit 3; [ -d "$(dirname -- "$1")" ] || exit 44"#;
/// `$2` owner, `$3` mode; `-h` for a link's own owner.
const ADJUST: &str = r#"if [ -n "$2" ]; then chown -h -- "$2" "$1" || exit 1; fi
if [ -n "$3" ] && [ ! -L "$1" ]; then chmod -- "$3" "$1"; fi"#;
const DELETE: &str = r#"[ -e "$1" ] || [ -L "$1" ] || exit 44
if [ -d "$1" ] && [ ! -L "$1" ]; then rmdir -- "$1" || exit 47; else rm -f -- "$1"; fi"#;

fn check(path: &str) -> Result<()> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return Err(Error::invalid("path", "a path inside a guest is absolute and has no NUL byte"));
    }
    Ok(())
}

async fn script(agent: &Agent, script: &str, arguments: &[&str]) -> Result<Ended> {
    let argv = [&["/bin/sh", "-c", script, "sh"], arguments].concat();
    agent.run(&argv, CALL).await
}

fn explain(path: &str, ended: &Ended) -> Error {
    let stderr = crate::line::printable(&String::from_utf8_lossy(&ended.stderr), 300);
    match ended.code {
        44 => Error::not_found(format!("{path:?} does not exist in the guest")),
        45 => Error::conflict(format!("{path:?} exists already in the guest")),
        46 => Error::invalid("path", format!("{path:?} is a directory in the guest")),
        47 => Error::conflict(format!("{path:?} is a directory that is not empty")),
        code => Error::internal(
            format!("{path:?} could not be used in the guest: {stderr}"),
            format!("exit code {code}"),
        ),
    }
}

async fn done(agent: &Agent, text: &str, path: &str, more: &[&str]) -> Result<Ended> {
    let ended = script(agent, text, &[&[path], more].concat()).await?;
    if ended.code == 0 { Ok(ended) } else { Err(explain(path, &ended)) }
}

fn nonsense() -> Error {
    Error::unavailable("the guest's answer about a file could not be understood")
}

/// Opens for reading.
///
/// # Errors
/// Not found; unsupported for devices and the like; unavailable without an agent.
pub async fn open(agent: &Arc<Agent>, path: &str) -> Result<OpenedFile> {
    check(path)?;
    let ended = done(agent, LOOK, path, &[]).await?;
    if ended.truncated {
        return Err(Error::too_large(format!("{path:?} has too many entries to list")));
    }
    let end = ended.stdout.iter().position(|b| *b == b'\n').ok_or_else(nonsense)?;
    let (line, rest) = (&ended.stdout[..end], &ended.stdout[end + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| nonsense())?;
    let fields: Vec<&str> = line.split(' ').collect();
    let [mode, uid, gid, size, modified] = fields[..] else {
        return Err(nonsense());
    };
    let mode = u32::from_str_radix(mode, 16).map_err(|_| nonsense())?;
    let kind = match mode & 0o170_000 {
        0o100_000 => FileKind::File,
        0o040_000 => FileKind::Directory,
        0o120_000 => FileKind::Symlink,
        _ => {
            return Err(Error::unsupported(format!("{path:?} is neither a file, a directory nor a link")));
        }
    };
    let info = FileInfo {
        kind,
        uid: uid.parse().map_err(|_| nonsense())?,
        gid: gid.parse().map_err(|_| nonsense())?,
        mode: mode & 0o7777,
        size: size.parse().map_err(|_| nonsense())?,
        modified: modified.parse().map_err(|_| nonsense())?,
    };
    let mut opened = OpenedFile { info, content: None, entries: vec![], target: None };
    match kind {
        FileKind::Symlink => opened.target = Some(String::from_utf8_lossy(rest).into_owned()),
        FileKind::Directory => {
            opened.entries = rest
                .split(|b| *b == 0)
                .map(|n| String::from_utf8_lossy(n.strip_prefix(b"./").unwrap_or(n)).into_owned())
                // A name out of a hostile guest may become a path at the client.
                .filter(|n| !n.is_empty() && !n.contains('/') && n != "." && n != "..")
                .collect();
            opened.entries.sort();
        }
        FileKind::File => opened.content = Some(content(agent.clone(), path).await?),
    }
    Ok(opened)
}

async fn handle(agent: &Agent, path: &str, mode: &str) -> Result<u64> {
    let answer = agent.call("guest-file-open", json!({"path": path, "mode": mode}), CALL).await?;
    answer.as_u64().ok_or_else(nonsense)
}

async fn close(agent: &Agent, handle: u64) -> Result<()> {
    agent.call("guest-file-close", json!({"handle": handle}), CALL).await.map(drop)
}

/// The read end of a pipe that the content flows through.
async fn content(agent: Arc<Agent>, path: &str) -> Result<OwnedFd> {
    let handle = handle(&agent, path, "r").await?;
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
    rustix::io::ioctl_fionbio(&write, true).map_err(std::io::Error::from)?;
    let mut write = pipe::Sender::from_owned_fd(write)?;
    tokio::spawn(async move {
        let copy = async {
            loop {
                let a =
                    agent.call("guest-file-read", json!({"handle": handle, "count": CHUNK}), CALL).await?;
                let data = a.get("buf-b64").and_then(Value::as_str).ok_or_else(nonsense)?;
                let data = BASE64_STANDARD.decode(data).map_err(|_| nonsense())?;
                if data.len() > CHUNK {
                    return Err(nonsense());
                }
                // The reader left: nothing more to do.
                if write.write_all(&data).await.is_err()
                    || a.get("eof").and_then(Value::as_bool) != Some(false)
                {
                    return Ok(());
                }
            }
        };
        let result: Result<()> = copy.await;
        if let Err(e) = result {
            tracing::warn!(error = %e, context = e.context, "a file of a guest could not be read to its end");
        }
        let _ = close(&agent, handle).await;
    });
    Ok(read)
}

/// Writes.
///
/// # Errors
/// Not found when the parent directory does not exist; conflict when a link's name is taken; unavailable without an agent.
pub async fn write(agent: &Agent, request: FileWrite, source: Option<OwnedFd>) -> Result<()> {
    let path = request.path.as_str();
    check(path)?;
    let mut default_mode = None;
    match request.kind {
        FileKind::Directory => {
            done(agent, MAKE_DIRECTORY, path, &[]).await?;
        }
        FileKind::Symlink => {
            let target = request
                .target
                .as_deref()
                .filter(|t| !t.is_empty() && !t.contains('\0'))
                .ok_or_else(|| Error::invalid("target", "a symbolic link needs a target"))?;
            done(agent, MAKE_LINK, path, &[target]).await?;
        }
        FileKind::File => {
            let before = script(agent, BEFORE_WRITE, &[path]).await?;
            match before.code {
                0 => default_mode = Some(0o644),
                3 => {}
                _ => return Err(explain(path, &before)),
            }
            let handle = handle(agent, path, if request.append { "a" } else { "w" }).await?;
            let written = match source {
                Some(source) => fill(agent, handle, source).await,
                None => Ok(()),
            };
            let closed = close(agent, handle).await;
            written.and(closed)?;
        }
    }
    let owner = match (request.uid, request.gid) {
        (None, None) => String::new(),
        (u, g) => format!(
            "{}{}",
            u.map(|u| u.to_string()).unwrap_or_default(),
            g.map(|g| format!(":{g}")).unwrap_or_default()
        ),
    };
    let mode = request.mode.or(default_mode).map(|m| format!("{:o}", m & 0o7777)).unwrap_or_default();
    if !owner.is_empty() || !mode.is_empty() {
        done(agent, ADJUST, path, &[&owner, &mode]).await?;
    }
    Ok(())
}

async fn fill(agent: &Agent, handle: u64, source: OwnedFd) -> Result<()> {
    let mut source = crate::exec::source(source)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = source.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        let data = BASE64_STANDARD.encode(&buffer[..n]);
        let a = agent.call("guest-file-write", json!({"handle": handle, "buf-b64": data}), CALL).await?;
        if a.get("count").and_then(Value::as_u64) != Some(n as u64) {
            return Err(Error::quota("the guest could not store the file; its disk may be full"));
        }
    }
    agent.call("guest-file-flush", json!({"handle": handle}), CALL).await.map(drop)
}

/// Deletes a file or an empty directory.
///
/// # Errors
/// Not found; conflict for a directory that is not empty.
pub async fn delete(agent: &Agent, path: &str) -> Result<()> {
    check(path)?;
    if path.trim_matches('/').is_empty() {
        return Err(Error::invalid("path", "the root of a guest cannot be deleted"));
    }
    done(agent, DELETE, path, &[]).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{fake, sync};
    use karst_model::ErrorKind;

    fn answering(stdout: &'static [u8], code: i32) -> (tempfile::TempDir, Arc<Agent>) {
        let (d, a) = fake(move |v| {
            sync(v).or_else(|| {
                let data = BASE64_STANDARD.encode(stdout);
                Some(match v["execute"].as_str() {
                    Some("guest-exec") => b"{\"return\": {\"pid\": 5}}\n".to_vec(),
                    Some("guest-exec-status") => {
                        format!("{{\"return\": {{\"exited\": true, \"exitcode\": {code}, \"out-data\": \"{data}\"}}}}\n").into_bytes()
                    }
                    _ => b"{\"return\": {}}\n".to_vec(),
                })
            })
        });
        (d, Arc::new(a))
    }

    #[tokio::test]
    async fn a_directory_of_a_hostile_guest_names_no_paths() {
        let (_d, a) = answering(b"41ed 0 0 4096 1700000000\n./b\0./a\0./../../etc/passwd\0..\0./x/y\0", 0);
        let o = open(&a, "/").await.unwrap();
        assert_eq!((o.entries, o.info.mode), (vec!["a".to_owned(), "b".to_owned()], 0o755));
    }

    #[tokio::test]
    async fn codes_become_errors() {
        for (code, kind) in [(44, ErrorKind::NotFound), (47, ErrorKind::Conflict), (1, ErrorKind::Internal)] {
            let (_d, a) = answering(b"", code);
            assert!(delete(&a, "/x").await.unwrap_err().is(kind));
        }
        for text in [&b""[..], b"zz 0 0 0 0\n", b"41ed 0 0 4096\n", b"41ed -1 0 4096 0\n"] {
            let (_d, a) = answering(text, 0);
            assert!(open(&a, "/x").await.unwrap_err().is(ErrorKind::Unavailable));
        }
        let (_d, a) = answering(b"", 0);
        assert!(open(&a, "relative").await.unwrap_err().is(ErrorKind::Invalid));
    }

    #[test]
    fn clients_that_send_nothing_more_hold_no_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (_d, agent) = fake(|v| {
                sync(v).or_else(|| {
                    Some(match v["execute"].as_str() {
                        Some("guest-exec") => b"{\"return\": {\"pid\": 5}}\n".to_vec(),
                        Some("guest-exec-status") => {
                            b"{\"return\": {\"exited\": true, \"exitcode\": 0, \"out-data\": \"\"}}\n"
                                .to_vec()
                        }
                        Some("guest-file-open") => b"{\"return\": 7}\n".to_vec(),
                        Some("guest-file-write") => {
                            let data = v["arguments"]["buf-b64"].as_str().unwrap();
                            let count = BASE64_STANDARD.decode(data).unwrap().len();
                            format!("{{\"return\": {{\"count\": {count}, \"eof\": false}}}}\n").into_bytes()
                        }
                        _ => b"{\"return\": {}}\n".to_vec(),
                    })
                })
            });
            let agent = Arc::new(agent);
            let writes = crate::exec::stalled::Writes::begin(3, |n, source| {
                let (agent, path) = (agent.clone(), format!("/stalled{n}"));
                async move { write(&agent, karst_guest::contract::write_of(&path), Some(source)).await }
            });
            writes.hold_no_thread().await;
        });
    }
}
