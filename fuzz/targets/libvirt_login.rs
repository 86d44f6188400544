//! What a client of libvirt says over TLS before it is somebody.
#![no_main]
#[path = "../entries/libvirt.rs"]
mod libvirt;

use std::sync::LazyLock;

static WORLD: LazyLock<libvirt::World> = LazyLock::new(libvirt::World::start);

libfuzzer_sys::fuzz_target!(|data: &[u8]| WORLD.login(data));
