//! XML of every kind that libvirt's clients send.
#![no_main]
#[path = "../entries/libvirt.rs"]
mod libvirt;

libfuzzer_sys::fuzz_target!(|text: &str| libvirt::documents(text));
