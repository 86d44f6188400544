//! What guests send to their host, and a host to Karst's agent in a guest. The first byte chooses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    match choice % 4 {
        0 => karst_vm_qemu::fuzzing::link(rest),
        1 => karst_vm_qemu::fuzzing::messages(rest),
        2 => karst_vm_qemu::fuzzing::qemu_agent(rest),
        _ => karst_guest_agent::agent::fuzzing::host(rest),
    }
});
