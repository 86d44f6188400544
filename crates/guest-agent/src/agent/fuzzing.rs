//! What is fuzzed of what a host sends to the agent. For `fuzz/` and for the test below, which runs the same with mutations of
//! known inputs by fixed seeds.

use super::{
    mux::{Mux, Stream},
    port::Port,
    refused,
};
use crate::message::{Request, refusal};
use std::{
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes of a host until it closes its side: the agent answers what it understands, nothing of it is done, and the end comes.
///
/// # Panics
/// When the agent does, or the system gives no sockets.
pub fn host(bytes: &[u8]) {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let name = format!("karst-fuzz-{}-{}", std::process::id(), NAMES.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let mut port = Port::Socket(UnixListener::bind_addr(&address).expect("a socket"));
    let mut host = UnixStream::connect_addr(&address).expect("it listens");
    let fd = port.open().expect("a connection");
    let sent = bytes.to_vec();
    let peer = std::thread::spawn(move || {
        let mut reader = host.try_clone().expect("a descriptor");
        let answers = std::thread::spawn(move || {
            let mut answers = vec![];
            // The agent may be gone before it has read all.
            let _ = reader.read_to_end(&mut answers);
            answers
        });
        let _ = host.write_all(&sent);
        let _ = host.shutdown(std::net::Shutdown::Write);
        answers.join().expect("the reader")
    });
    let mux = Arc::new(Mux::default());
    mux.serve(fd, &port, answer);
    drop((mux, port));
    let mut decoder = crate::wire::Decoder::default();
    decoder.push(&peer.join().expect("the host"), |decoded| {
        assert!(matches!(decoded, crate::wire::Decoded::Frame(_)), "the agent sends what is no frame");
    });
}

/// Programs stay open and take input, everything else is refused: nothing happens on this machine.
fn answer(stream: Arc<Stream>, request: Request) {
    match request {
        Request::Exec(_) => {}
        Request::Write(_) => {
            while let Ok(input) = stream.input() {
                stream.used(input.len());
            }
            stream.finished();
        }
        _ => {
            stream.fail(refused(refusal::BUSY, "", "it is only tried"));
            stream.finished();
        }
    }
}

#[cfg(test)]
#[path = "../../../../fuzz/entries/mutate.rs"]
mod mutate;

#[cfg(test)]
mod tests {
    use super::{mutate::Mutator, *};
    use crate::{
        message::{Control, Exec, Nothing, Wire, Write as WriteFile},
        wire::{Frame, MAX_DATA, VERSION, channel, kind},
    };

    #[test]
    fn a_host_sends_any_bytes() {
        let hello = Frame::new(kind::HELLO, 0, ([7u8; 16], (VERSION, VERSION)).encoded()).encode();
        let exec = Request::Exec(Exec { argv: vec!["/bin/true".into()], ..Exec::default() });
        let write = Request::Write(WriteFile { path: "/tmp/x".into(), ..WriteFile::default() });
        let frames = [
            Frame::new(kind::OPEN, 1, exec.encoded()),
            Frame::data(1, channel::IN, &[1; MAX_DATA]),
            Frame::credit(1, channel::OUT, u32::MAX),
            Frame::new(kind::CONTROL, 1, Control::Signal(9).encoded()),
            Frame::new(kind::OPEN, 2, write.encoded()),
            Frame::eof(2, channel::IN),
            Frame::new(kind::OPEN, 3, Request::Info(Nothing {}).encoded()),
            Frame::new(kind::CLOSE, 1, vec![]),
        ];
        let one = |f: &Frame| [&[0][..], &hello, &f.encode()].concat();
        let mut seeds: Vec<Vec<u8>> = frames.iter().map(one).collect();
        let all: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        seeds.push([&[0][..], &hello, &all, &hello, &all].concat());
        // More than the window of a program that does not read, and more streams than there may be.
        seeds.push([&[0][..], &hello, &frames[0].encode(), &frames[1].encode().repeat(6)].concat());
        let many = (1..100).flat_map(|n| Frame::new(kind::OPEN, n, exec.encoded()).encode());
        seeds.push([&[0][..], &hello, &many.collect::<Vec<u8>>()].concat());
        seeds.iter().for_each(|seed| host(seed));
        let mut mutator = Mutator::new(1);
        for _ in 0..500 {
            host(&mutator.mutated(&seeds, 64 << 10));
        }
    }
}
