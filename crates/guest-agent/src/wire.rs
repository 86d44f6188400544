//! Frames over a byte stream that either side may leave in the middle of one.
//!
//! A frame is kind (u8), stream (u32), length (u32), payload; numbers are little endian. Consistent Overhead Byte Stuffing
//! (Cheshire and Baker, 1999) makes it free of zero bytes, and a zero byte ends it. So whoever begins (again) sends a zero
//! and is understood from there on, whatever was torn before: the rest of a torn frame is a frame of the wrong length,
//! which is no frame. A stream that was cut is told from one that goes on by the nonce of the handshake.
//!
//! Streams are numbered by the host, upwards, and never again in one connection. Each direction of each channel of a
//! stream has [`WINDOW`] bytes of credit at first; who takes bytes away gives credit back. Nobody sends without credit, so
//! nobody keeps more than a window for a peer that does not read.

/// Version of the protocol; the host offers a range, the agent chooses.
pub const VERSION: u16 = 1;
/// Longest payload of a frame.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// Most bytes in a [`kind::DATA`] frame.
pub const MAX_DATA: usize = 32 << 10;
/// Bytes that may be on the way in one direction of one channel.
pub const WINDOW: u32 = 128 << 10;
/// Most streams that are open at a time.
pub const MAX_STREAMS: usize = 64;
/// Bytes of the handshake's nonce.
pub const NONCE: usize = 16;

const HEADER: usize = 9;
/// Longest frame as it is sent, without the zero: one byte more for each 254, and the first.
const MAX_ENCODED: usize = HEADER + MAX_PAYLOAD + (HEADER + MAX_PAYLOAD) / 254 + 2;

/// What a frame is. A kind that is not known is ignored.
pub mod kind {
    /// Host: nonce, lowest and highest version (u16). Ends all streams.
    pub const HELLO: u8 = 1;
    /// Agent: [`crate::message::Welcome`].
    pub const WELCOME: u8 = 2;
    /// Agent: it has just started and knows no stream.
    pub const READY: u8 = 3;
    /// Host: a new stream with this [`crate::message::Request`].
    pub const OPEN: u8 = 16;
    /// Agent: the first frame of a stream: a [`crate::message::Reply`].
    pub const REPLY: u8 = 17;
    /// Both: channel (u8), bytes.
    pub const DATA: u8 = 18;
    /// Both: channel (u8): no more bytes will come.
    pub const EOF: u8 = 19;
    /// Both: channel (u8), bytes (u32) that may be sent more.
    pub const CREDIT: u8 = 20;
    /// Host: a [`crate::message::Control`].
    pub const CONTROL: u8 = 21;
    /// Agent: what was asked for has ended: a [`crate::message::Reply`] of [`crate::message::Ended`].
    pub const END: u8 = 22;
    /// Host: end it, now. Agent: nothing more comes of this stream.
    pub const CLOSE: u8 = 23;
}

/// Channels of a stream.
pub mod channel {
    /// Towards the guest: standard input, a file's content.
    pub const IN: u8 = 0;
    /// Towards the host: standard output, all output of a terminal, a file's content, a directory's names.
    pub const OUT: u8 = 1;
    /// Towards the host: standard error.
    pub const ERR: u8 = 2;
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// One of [`kind`].
    pub kind: u8,
    /// Stream; 0 for the connection itself.
    pub stream: u32,
    /// What belongs to it.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(kind: u8, stream: u32, payload: Vec<u8>) -> Self {
        Self { kind, stream, payload }
    }

    /// Bytes of a channel, at most [`MAX_DATA`].
    pub fn data(stream: u32, channel: u8, bytes: &[u8]) -> Self {
        let mut payload = Vec::with_capacity(1 + bytes.len());
        payload.push(channel);
        payload.extend_from_slice(bytes);
        Self::new(kind::DATA, stream, payload)
    }

    /// The end of a channel.
    pub fn eof(stream: u32, channel: u8) -> Self {
        Self::new(kind::EOF, stream, vec![channel])
    }

    /// More credit.
    pub fn credit(stream: u32, channel: u8, bytes: u32) -> Self {
        let mut payload = vec![channel];
        payload.extend(bytes.to_le_bytes());
        Self::new(kind::CREDIT, stream, payload)
    }

    /// Channel and the rest of the payload.
    pub fn channel(&self) -> Option<(u8, &[u8])> {
        self.payload.split_first().map(|(c, rest)| (*c, rest))
    }

    /// Channel and credit.
    pub fn as_credit(&self) -> Option<(u8, u32)> {
        let (channel, rest) = self.channel()?;
        Some((channel, u32::from_le_bytes(rest.try_into().ok()?)))
    }

    /// As it goes over the wire, with the zero at its end.
    ///
    /// # Panics
    /// When the payload is longer than [`MAX_PAYLOAD`].
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.payload.len() <= MAX_PAYLOAD, "a frame of {} bytes", self.payload.len());
        let mut header = [0; HEADER];
        header[0] = self.kind;
        header[1..5].copy_from_slice(&self.stream.to_le_bytes());
        header[5..].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        let mut out = Vec::with_capacity(self.payload.len() + self.payload.len() / 254 + HEADER + 3);
        stuff(&[&header, &self.payload], &mut out);
        out.push(0);
        out
    }
}

/// Appends the concatenation of `parts`, free of zeros.
fn stuff(parts: &[&[u8]], out: &mut Vec<u8>) {
    let mut code_at = out.len();
    out.push(0);
    let mut run = 0u8;
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            let room = usize::from(254 - run).min(rest.len());
            let zero = rest[..room].iter().position(|b| *b == 0);
            let n = zero.unwrap_or(room);
            out.extend_from_slice(&rest[..n]);
            run += n as u8;
            rest = &rest[n + usize::from(zero.is_some())..];
            if zero.is_some() || run == 254 {
                out[code_at] = run + 1;
                code_at = out.len();
                out.push(0);
                run = 0;
            }
        }
    }
    out[code_at] = run + 1;
}

/// Undoes [`stuff`]; `None` for what it cannot have made.
fn unstuff(mut data: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(data.len());
    while let Some((&code, rest)) = data.split_first() {
        let n = usize::from(code.checked_sub(1)?);
        let run = rest.get(..n)?;
        out.extend_from_slice(run);
        data = &rest[n..];
        if code != 255 && !data.is_empty() {
            out.push(0);
        }
    }
    Some(out)
}

fn decode(encoded: &[u8]) -> Option<Frame> {
    let mut bytes = unstuff(encoded)?;
    let header: [u8; HEADER] = bytes.get(..HEADER)?.try_into().ok()?;
    let [kind, a, b, c, d, length @ ..] = header;
    if u32::from_le_bytes(length) as usize != bytes.len() - HEADER || bytes.len() - HEADER > MAX_PAYLOAD {
        return None;
    }
    bytes.drain(..HEADER);
    Some(Frame { kind, stream: u32::from_le_bytes([a, b, c, d]), payload: bytes })
}

/// What came out of a [`Decoder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A frame.
    Frame(Frame),
    /// Bytes up to a zero that are no frame. Right after a beginning they are what was torn there.
    Malformed,
}

/// Takes bytes and gives frames; holds less than two frames' bytes whatever comes.
#[derive(Debug, Default)]
pub struct Decoder {
    kept: Vec<u8>,
    /// More came than a frame can have: everything up to the next zero is dropped.
    overrun: bool,
}

impl Decoder {
    /// Calls `each` for all that is complete with `bytes`.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(Decoded)) {
        let mut parts = bytes.split(|b| *b == 0).peekable();
        while let Some(part) = parts.next() {
            if self.kept.len() + part.len() > MAX_ENCODED {
                self.overrun = true;
                self.kept = vec![];
            }
            if !self.overrun {
                self.kept.extend_from_slice(part);
            }
            if parts.peek().is_none() {
                return; // no zero came after it
            }
            let overrun = std::mem::take(&mut self.overrun);
            if overrun || !self.kept.is_empty() {
                each(decode(&self.kept).filter(|_| !overrun).map_or(Decoded::Malformed, Decoded::Frame));
            }
            self.kept.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(chunks: &[&[u8]]) -> Vec<Decoded> {
        let (mut decoder, mut out) = (Decoder::default(), vec![]);
        for c in chunks {
            decoder.push(c, |d| out.push(d));
        }
        assert!(decoder.kept.len() <= MAX_ENCODED);
        out
    }

    fn frames() -> impl Strategy<Value = Frame> {
        let byte = prop_oneof![Just(0u8), Just(255u8), any::<u8>()];
        let payload = proptest::collection::vec(byte, 0..1200);
        (any::<u8>(), any::<u32>(), payload)
            .prop_map(|(kind, stream, payload)| Frame::new(kind, stream, payload))
    }

    #[test]
    fn the_edges_of_stuffing() {
        for n in [0, 1, 244, 245, 246, 253, 254, 255, 508, 1000, MAX_PAYLOAD] {
            for fill in [0u8, 1, 255] {
                let frame = Frame::new(7, u32::MAX, vec![fill; n]);
                let bytes = frame.encode();
                assert!(bytes.len() <= MAX_ENCODED + 1 && !bytes[..bytes.len() - 1].contains(&0));
                assert_eq!(all(&[&bytes]), [Decoded::Frame(frame)]);
            }
        }
    }

    #[test]
    fn a_flood_without_an_end_is_dropped_and_the_next_frame_is_understood() {
        let flood = vec![1; 10 * MAX_ENCODED];
        let frame = Frame::new(1, 2, vec![3]);
        let mut bytes = vec![0];
        bytes.extend(frame.encode());
        assert_eq!(all(&[&flood, &flood, &bytes]), [Decoded::Malformed, Decoded::Frame(frame)]);
    }

    proptest! {
        #[test]
        fn what_was_sent_is_received_however_it_is_cut(sent in proptest::collection::vec(frames(), 0..5), cut in 1..700usize) {
            let bytes: Vec<u8> = sent.iter().flat_map(Frame::encode).collect();
            let chunks: Vec<&[u8]> = bytes.chunks(cut).collect();
            let sent: Vec<Decoded> = sent.into_iter().map(Decoded::Frame).collect();
            prop_assert_eq!(all(&chunks), sent);
        }

        #[test]
        fn who_begins_again_after_a_torn_frame_is_understood(torn in frames(), at in any::<prop::sample::Index>(), next in frames()) {
            let torn = torn.encode();
            let mut bytes = torn[..at.index(torn.len() - 1)].to_vec();
            bytes.push(0);
            bytes.extend(next.encode());
            let got = all(&[&bytes]);
            prop_assert_eq!(got.last(), Some(&Decoded::Frame(next)));
            // What was torn never passes for a frame.
            prop_assert_eq!(got.iter().filter(|d| matches!(d, Decoded::Frame(_))).count(), 1);
        }

        #[test]
        fn garbage_never_panics(data in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..5000)) {
            for d in all(&[&data]) {
                if let Decoded::Frame(f) = d {
                    prop_assert!(f.payload.len() <= MAX_PAYLOAD);
                    let _ = (f.channel(), f.as_credit());
                }
            }
        }
    }
}
