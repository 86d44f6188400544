//! What is fuzzed of what a guest sends: by Karst's agent, and by QEMU's. For `fuzz/` and for the tests below, which run the
//! same with mutations of known inputs by fixed seeds.

use crate::{inside, line};
use karst_guest_agent::{
    message::{
        Control, Ended, Exec, Figures, Frozen, Hello, Info, Interfaces, Nothing, Opened, Reply, Request,
        Started, Welcome, Wire,
    },
    wire::{Frame, MAX_PAYLOAD, WINDOW},
};

/// Longest line that is taken here; the real one has room for a file.
const LINE: usize = 64 << 10;

/// Bytes of a guest on a connection to Karst's agent: no more is kept than one answer, one end and two windows. The first byte
/// says in which pieces they come.
pub fn link(bytes: &[u8]) {
    let Some((piece, rest)) = bytes.split_first() else { return };
    let [reply, end, out, err] = inside::taken(rest, usize::from(*piece) * 16 + 1);
    assert!(reply <= MAX_PAYLOAD && end <= MAX_PAYLOAD, "an answer of {reply} bytes, an end of {end}");
    assert!(out.max(err) <= WINDOW as usize, "{out} and {err} bytes without credit");
    assert!(reply + end + out + err <= rest.len(), "more is kept than came");
}

/// A message out of any bytes: what it is encoded as is the same message.
fn message<T: Wire + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = T::decoded(bytes) {
        assert_eq!(T::decoded(&message.encoded()), Ok(message));
    }
}

/// Every message that a host takes, and those that a guest does.
pub fn messages(bytes: &[u8]) {
    message::<Welcome>(bytes);
    message::<Reply<Nothing>>(bytes);
    message::<Reply<Started>>(bytes);
    message::<Reply<Ended>>(bytes);
    message::<Reply<Opened>>(bytes);
    message::<Reply<Info>>(bytes);
    message::<Reply<Interfaces>>(bytes);
    message::<Reply<Figures>>(bytes);
    message::<Reply<Frozen>>(bytes);
    message::<Hello>(bytes);
    message::<Request>(bytes);
    message::<Control>(bytes);
    message::<Exec>(bytes);
}

/// Bytes of QEMU's agent (and of QEMU's monitor, which speaks in lines as well).
pub fn qemu_agent(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut lines = line::Lines::new(bytes, LINE);
        let mut came = 0;
        while let Ok(Some(line)) = lines.next().await {
            came += line.len() + 1;
            assert!(came <= bytes.len(), "more lines than bytes");
            // As `guest-sync-delimited` has it.
            let line = line.rsplit(|b| *b == 0xff).next().unwrap_or_default();
            if let Ok(object) = line::object(line) {
                let text = object.get("error").and_then(|e| e.get("desc")).and_then(|d| d.as_str());
                let shown = line::printable(text.unwrap_or_default(), 300);
                assert!(!shown.chars().any(char::is_control) && shown.chars().count() <= 300);
            }
        }
    });
}

/// Frames that a guest may send, for what is tried to begin with.
pub fn frames() -> Vec<Vec<u8>> {
    use karst_guest_agent::wire::{channel, kind};
    let info = Info { os: "Debian".into(), uptime: 7, ..Info::default() };
    let one = |frame: Frame| frame.encode();
    vec![
        one(Frame::new(kind::REPLY, 1, Reply(Ok(info)).encoded())),
        one(Frame::new(kind::END, 1, Reply(Ok(Ended { code: 1 })).encoded())),
        one(Frame::data(1, channel::OUT, &[7; 4000])),
        one(Frame::data(1, channel::ERR, &[0; 300])),
        one(Frame::eof(1, channel::OUT)),
        one(Frame::eof(1, channel::IN)),
        one(Frame::credit(1, channel::IN, 0)),
        one(Frame::new(kind::CLOSE, 1, vec![])),
        one(Frame::new(kind::READY, 0, vec![])),
        one(Frame::data(2, channel::OUT, b"nobody's")),
    ]
}

#[cfg(test)]
#[path = "../../../../fuzz/entries/memory.rs"]
mod memory;
#[cfg(test)]
#[path = "../../../../fuzz/entries/mutate.rs"]
mod mutate;

#[cfg(test)]
mod tests {
    use super::{memory::most, mutate::Mutator, *};
    use karst_guest_agent::message::{Bytes, Interface};

    #[global_allocator]
    static ALLOCATOR: super::memory::Counting = super::memory::Counting;

    #[test]
    fn a_guest_sends_any_bytes_by_karsts_agent() {
        let frames = frames();
        // As they come, and two windows of data, which is one too many.
        link(&[&[255][..], &frames[..8].concat()].concat());
        let flood = frames[2].repeat(2 * WINDOW as usize / 4000);
        let [_, _, out, _] = inside::taken(&flood, 4096);
        assert!(out > WINDOW as usize / 2 && out <= WINDOW as usize, "{out}");
        let mut seeds: Vec<Vec<u8>> = frames.iter().map(|f| [&[9][..], f].concat()).collect();
        seeds.push([&[255][..], &frames[..8].concat()].concat());
        seeds.push([&[40][..], &flood].concat());
        let mut mutator = Mutator::new(1);
        for _ in 0..3000 {
            let input = mutator.mutated(&seeds, 160 << 10);
            // What is kept, a frame that is being put together, and one that is taken apart.
            let most = most(|| link(&input));
            assert!(most <= (1 << 20) + 2 * input.len(), "{most} bytes for {}", input.escape_ascii());
        }
    }

    #[test]
    fn messages_of_any_bytes() {
        let interface = Interface {
            name: "eth0".into(),
            mac: "52:54:00:11:22:33".into(),
            counters: vec![1; 8],
            addresses: vec![(Bytes(vec![10, 0, 0, 1]), 24)],
            ..Interface::default()
        };
        let exec = Exec {
            argv: vec!["/bin/sh".into(), "-c".into()],
            env: vec![("A".into(), "b".into())],
            cwd: Some("/".into()),
            terminal: Some((80, 24)),
            ..Exec::default()
        };
        let mut seeds = vec![
            Reply(Ok(Interfaces { list: vec![interface; 4] })).encoded(),
            Reply(Ok(Figures { memory: vec![1; 7], cpu: vec![2; 8], ..Figures::default() })).encoded(),
            Reply(Ok(Opened { mode: 0o644, size: 9, ..Opened::default() })).encoded(),
            Reply::<Nothing>(Err(karst_guest_agent::message::Refused { code: 1, ..Default::default() }))
                .encoded(),
            Request::Exec(exec.clone()).encoded(),
            exec.encoded(),
            Control::Resize((80, 24)).encoded(),
            ([7u8; 16], (1u16, 1u16)).encoded(),
        ];
        seeds.push(seeds.concat());
        seeds.iter().for_each(|seed| messages(seed));
        let mut mutator = Mutator::new(2);
        for _ in 0..6000 {
            let input = mutator.mutated(&seeds, MAX_PAYLOAD);
            // The smallest records take 4 bytes and are a hundred large, in lists that have room for twice as many.
            let most = most(|| messages(&input));
            assert!(most <= (64 << 10) + 512 * input.len(), "{most} bytes for {}", input.escape_ascii());
        }
    }

    #[test]
    fn lines_of_any_bytes_by_qemus_agent() {
        let seeds: Vec<Vec<u8>> = [
            &b"{\"return\": 12}\n\xff{\"return\": 99}\n"[..],
            b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\\u0007\"}}\n",
            b"{\"return\": {\"exited\": true, \"exitcode\": 7, \"out-data\": \"aGVsbG8=\"}}\r\n",
            b"[[[[{\"a\": [1.5e300, -0, null, true, \"\\ud83d\\ude00\"]}]]]]\n",
        ]
        .iter()
        .map(|line| line.repeat(3))
        .collect();
        let mut mutator = Mutator::new(3);
        for _ in 0..3000 {
            let input = mutator.mutated(&seeds, 2 * LINE);
            let most = most(|| qemu_agent(&input));
            assert!(most <= (1 << 20) + 256 * input.len(), "{most} bytes for {}", input.escape_ascii());
        }
    }
}
