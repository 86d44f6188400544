//! Calls of libvirt's protocol to an engine with a simulated host.
#![no_main]
#[path = "../entries/libvirt.rs"]
mod libvirt;

use std::sync::LazyLock;

static WORLD: LazyLock<libvirt::World> = LazyLock::new(libvirt::World::start);

libfuzzer_sys::fuzz_target!(|data: &[u8]| WORLD.converse(data));
