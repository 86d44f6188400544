//! Descriptors beside frames: their number stands before the payload, and each follows the frame with one byte of its own,
//! as `virnetsocket.c` of libvirt sends and takes them.

use crate::xdr::Reader;
use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};
use tokio::{io::Interest, net::UnixStream};

/// Most of one frame (`VIR_NET_MESSAGE_NUM_FDS_MAX`).
pub const MOST: usize = 32;

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Sends descriptors after their frame; they are closed here.
///
/// # Errors
/// Those of the transport.
pub async fn send(stream: &UnixStream, fds: Vec<OwnedFd>) -> io::Result<()> {
    for fd in fds {
        let one = [fd.as_fd()];
        let sent = stream.async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&one));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut control, flags)?)
        });
        if sent.await? != 1 {
            return Err(bad("a descriptor was not sent"));
        }
    }
    Ok(())
}

/// Takes the descriptors of a call; their number is taken off its payload.
///
/// # Errors
/// Invalid data for what is no number of descriptors, or none of them; those of the transport.
pub async fn of_call(stream: &UnixStream, payload: &mut Bytes) -> io::Result<Vec<OwnedFd>> {
    let count = Reader::new(payload).u32().map_err(|_| bad("no number of descriptors"))? as usize;
    if count > MOST {
        return Err(bad("too many descriptors"));
    }
    *payload = payload.slice(4..);
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        all.push(take(stream).await?);
    }
    Ok(all)
}

/// Takes one.
///
/// # Errors
/// As [`of_call`].
pub async fn take(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut taken = vec![];
    let got = stream.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                taken.extend(more);
            }
        }
        Ok(got.bytes)
    });
    match (got.await?, taken.pop()) {
        (1, Some(fd)) => Ok(fd),
        _ => Err(bad("a descriptor was announced and did not come")),
    }
}
