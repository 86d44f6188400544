//! Bytes as frames of libvirt's protocol.
#![no_main]
#[path = "../entries/libvirt.rs"]
mod libvirt;

libfuzzer_sys::fuzz_target!(|data: &[u8]| libvirt::frames(data));
