//! Descriptors that the host opened (pipes, terminals, sockets, files) as asynchronous byte streams.

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// One descriptor; clones share it, so that one task may read while another writes.
#[derive(Debug, Clone)]
pub struct FdStream(Arc<AsyncFd<OwnedFd>>);

impl FdStream {
    /// Takes a descriptor that can be polled; it becomes non-blocking.
    ///
    /// # Errors
    /// When it cannot be polled (a regular file).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd always gives the same descriptor and keeps it open until it is dropped, which is after the
        // AsyncFd around it has deregistered it.
        Ok(Self(Arc::new(unsafe { AsyncFd::register(fd)? })))
    }
}

impl AsyncRead for FdStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let done = guard.try_io(|fd| {
                let space = buf.initialize_unfilled();
                match rustix::io::read(fd.get_ref(), space) {
                    Ok(n) => Ok(n),
                    // The other end of a terminal is gone: that is its end of file.
                    Err(rustix::io::Errno::IO) => Ok(0),
                    Err(e) => Err(e.into()),
                }
            });
            match done {
                Ok(result) => {
                    buf.advance(result?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => continue,
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => continue,
            }
        }
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Dropping the last clone closes it; a socket is told at once.
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

/// Any descriptor.
#[derive(Debug)]
pub enum Stream {
    /// It can be polled.
    Polled(FdStream),
    /// A regular file.
    File(tokio::fs::File),
}

impl Stream {
    /// Takes any descriptor.
    ///
    /// # Errors
    /// When it is none.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile {
            return Ok(Self::File(tokio::fs::File::from_std(std::fs::File::from(fd))));
        }
        FdStream::new(fd).map(Self::Polled)
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Polled(s) => Pin::new(s).poll_read(cx, buf),
            Self::File(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Polled(s) => Pin::new(s).poll_write(cx, data),
            Self::File(s) => Pin::new(s).poll_write(cx, data),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Polled(s) => Pin::new(s).poll_flush(cx),
            Self::File(s) => Pin::new(s).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Polled(s) => Pin::new(s).poll_shutdown(cx),
            Self::File(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests run on the real runtime
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn pipes_sockets_and_files() {
        let (r, w) = rustix::pipe::pipe().unwrap();
        let (mut r, mut w) = (Stream::new(r).unwrap(), Stream::new(w).unwrap());
        let writer = tokio::spawn(async move {
            // More than a pipe holds, so that both sides must wait for each other.
            w.write_all(&vec![7; 300_000]).await.unwrap();
        });
        let mut all = vec![];
        r.read_to_end(&mut all).await.unwrap();
        writer.await.unwrap();
        assert_eq!(all.len(), 300_000);

        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut a, mut b) = (Stream::new(a.into()).unwrap(), Stream::new(b.into()).unwrap());
        a.write_all(b"hello").await.unwrap();
        a.shutdown().await.unwrap();
        let mut text = String::new();
        b.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");

        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"in a file").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut file = Stream::new(file.into()).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "in a file");
    }
}
