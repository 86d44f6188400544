//! Mutated inputs by fixed seeds, for all that takes the bytes of strangers: nothing panics, what is decoded takes no more
//! memory than what came allows, and only the connection that it came over ends. `fuzz/` goes on where this stops.
#![allow(clippy::disallowed_methods)] // a test tool

#[path = "../../../../fuzz/entries/libvirt.rs"]
mod entries;
#[path = "../../../../fuzz/entries/memory.rs"]
mod memory;
#[path = "../../../../fuzz/entries/mutate.rs"]
mod mutate;

use entries::{DOCUMENTS, OPENED, RAW, World};
use karst_engine::tenancy::scram::MECHANISM;
use karst_frontend_libvirt::{
    frame::{Frame, Header, Kind, REMOTE, Status},
    xdr::Writer,
};
use mutate::Mutator;
use std::sync::{Mutex, Once};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Panics of the product's code, wherever they happened: a server's tasks keep theirs to themselves.
static PANICS: Mutex<Vec<String>> = Mutex::new(vec![]);

fn panics() -> Vec<String> {
    PANICS.lock().unwrap_or_else(|e| e.into_inner()).clone()
}

/// From now on they are written down.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let own = |file: &str| file.contains("tests/") || file.contains("fuzz/entries/");
            if info.location().is_none_or(|l| !own(l.file())) {
                PANICS.lock().unwrap_or_else(|e| e.into_inner()).push(info.to_string());
            }
            before(info);
        }));
    });
}

/// An input as a test can have it.
fn shown(input: &[u8]) -> String {
    input.escape_ascii().to_string()
}

fn call(procedure: i32, serial: u32, payload: Vec<u8>) -> Vec<u8> {
    let header =
        Header { program: REMOTE, version: 1, procedure, kind: Kind::Call, serial, status: Status::Ok };
    Frame::new(header, payload).encode()
}

#[test]
fn frames_of_any_bytes_cost_what_they_are() {
    let seeds: Vec<Vec<u8>> = (0..8)
        .map(|n| (0..n + 1u32).flat_map(|serial| call(n as i32, serial, vec![n as u8; 40 << n])).collect())
        .collect();
    let mut mutator = Mutator::new(1);
    for _ in 0..4000 {
        let input = mutator.mutated(&seeds, 32 << 10);
        let most = memory::most(|| entries::frames(&input));
        // One piece of what was announced, the runtime that reads, and copies of what came.
        assert!(most <= (512 << 10) + 8 * input.len(), "{most} bytes for {}", shown(&input));
    }
}

#[test]
fn documents_of_any_text_are_read_or_refused() {
    let seeds: Vec<Vec<u8>> = DOCUMENTS.iter().map(|d| d.as_bytes().to_vec()).collect();
    // What is made once for all of them is not counted.
    DOCUMENTS.iter().for_each(|d| entries::documents(d));
    let mut mutator = Mutator::new(2);
    for _ in 0..1500 {
        let input = mutator.mutated(&seeds, 64 << 10);
        let text = String::from_utf8_lossy(&input);
        let most = memory::most(|| entries::documents(&text));
        assert!(most <= (1 << 20) + 512 * text.len(), "{most} bytes for {text}");
    }
}

#[test]
fn what_is_kept_of_documents_is_read_the_same_again() {
    // White space by numbers, and elements without anything: written in another form, and then always in that.
    for text in ["<a x='1&#10;2'>b&#13;c</a>", "<a ><b></b><![CDATA[]]></a>", "<a>&#160;<b/></a>"] {
        entries::documents(text);
    }
    // What is no name of XML is none of an element either: written with something in it, it would end itself.
    for text in ["<a/ ><b/></a/>", "<1/>", "<a 1='x'/>", "<a b=c='x'/>", "<-/>", "<a,b/>"] {
        let refused = karst_frontend_libvirt::xml::read::document(text);
        assert!(refused.is_err(), "{text}: {refused:?}");
    }
}

/// A message of the mechanism as the protocol has it: a word for each byte.
fn message(text: &str) -> Vec<u8> {
    let mut w = Writer::new();
    w.i32(0).array(text.as_bytes(), |w, byte| {
        w.u32(u32::from(*byte));
    });
    w.finish()
}

#[test]
fn nobody_becomes_somebody_by_any_bytes() {
    watch_panics();
    let world = World::start();
    let mut mechanism = Writer::new();
    mechanism.string(MECHANISM);
    let first = [mechanism.finish(), message("n,,n=token,r=fyko+d2lbbFgONRv9qkxdawL")].concat();
    let last = message("c=biws,r=fyko+d2lbbFgONRv9qkxdawL,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=");
    let login = [call(66, 1, vec![]), call(67, 2, vec![]), call(68, 3, first), call(69, 4, last)];
    let mut seeds = vec![login.concat(), [login[2].clone(), login[3].clone()].concat()];
    seeds.extend(login);
    seeds.iter().for_each(|seed| world.login(seed));
    let mut mutator = Mutator::new(3);
    for _ in 0..150 {
        let input = mutator.mutated(&seeds, 16 << 10);
        world.login(&input);
        assert_eq!(panics(), Vec::<String>::new(), "{}", shown(&input));
    }
}

#[test]
fn calls_of_any_kind_end_their_own_connection_only() {
    watch_panics();
    let world = World::start();
    let (stay, remove) = entries::seeds();
    // As they are, as many in a conversation as it has; those that take something away at the end.
    for flags in [OPENED, OPENED | entries::CONTAINERS, OPENED | entries::READ_ONLY, 0] {
        for seeds in [&stay, &remove] {
            let made = flags & !entries::READ_ONLY | OPENED;
            let fitting: Vec<&[u8]> = seeds.iter().filter(|s| s[0] == made).map(|s| &s[1..]).collect();
            // Without a connection, and where nothing may change, a part of them does.
            let part = if flags == made { 1 } else { 7 };
            let fitting: Vec<&[u8]> = fitting.into_iter().step_by(part).collect();
            for conversation in fitting.chunks(entries::CALLS) {
                let input = [&[flags][..], &conversation.concat()].concat();
                world.converse(&input);
                assert_eq!(panics(), Vec::<String>::new(), "{}", shown(&input));
            }
        }
    }
    drop(world);
    let world = World::start();
    let seeds = stay;
    assert!(seeds.iter().any(|s| s[0] & RAW != 0) && seeds.iter().any(|s| s[0] & RAW == 0));
    let mut mutator = Mutator::new(4);
    for _ in 0..250 {
        let input = mutator.mutated(&seeds, 4096);
        world.converse(&input);
        assert_eq!(panics(), Vec::<String>::new(), "{}", shown(&input));
    }
}

#[test]
#[ignore = "writes what cargo-fuzz begins with into fuzz/corpus"]
fn seeds_for_cargo_fuzz() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../fuzz/corpus");
    let (stay, remove) = entries::seeds();
    let documents = DOCUMENTS.iter().map(|d| d.as_bytes().to_vec()).collect();
    for (target, seeds) in [("libvirt_calls", [stay, remove].concat()), ("libvirt_documents", documents)] {
        let directory = corpus.join(target);
        std::fs::create_dir_all(&directory).unwrap();
        for (n, seed) in seeds.iter().enumerate() {
            std::fs::write(directory.join(format!("seed{n:04}")), seed).unwrap();
        }
    }
}
