//! The seccomp filter of programs that enter a container: the same few calls that the container's own profile refuses.

use super::{At, Outcome};
use crate::sys;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const BITS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

/// Calls by architecture: the audit architecture, refused numbers, and `umount2`, refused with `MNT_FORCE`.
#[cfg(target_arch = "x86_64")]
const TABLES: &[(u32, &[u32], u32)] = &[
    // x86-64: kexec_load, kexec_file_load, open_by_handle_at, init_module, finit_module, delete_module
    (0xc000_003e, &[246, 320, 304, 175, 313, 176], 166),
    // i386, the same
    (0x4000_0003, &[283, 342, 128, 350, 129], 52),
];
#[cfg(target_arch = "aarch64")]
const TABLES: &[(u32, &[u32], u32)] = &[
    (0xc000_00b7, &[104, 294, 265, 105, 273, 106], 39),
    // 32-bit ARM, the same
    (0x4000_0028, &[347, 401, 371, 128, 379, 129], 52),
];

/// The x32 numbers are those of x86-64 with this bit; no distribution uses them and a filter is easily passed by them.
const X32: u32 = 0x4000_0000;

fn step(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// The program.
fn program() -> Vec<libc::sock_filter> {
    let mut out = vec![];
    for (architecture, refused, umount) in TABLES {
        let mut block = vec![step(LOAD, 0, 0, 0)];
        if cfg!(target_arch = "x86_64") && *architecture == 0xc000_003e {
            block.push(step(BITS, X32, 0, 1));
            block.push(step(RETURN, ERRNO | libc::ENOSYS as u32, 0, 0));
        }
        for number in *refused {
            block.push(step(EQUAL, *number, 0, 1));
            block.push(step(RETURN, ERRNO | libc::EPERM as u32, 0, 0));
        }
        // The flags are the second argument, whose low half lies at offset 24.
        block.push(step(EQUAL, *umount, 0, 3));
        block.push(step(LOAD, 24, 0, 0));
        block.push(step(BITS, libc::MNT_FORCE as u32, 0, 1));
        block.push(step(RETURN, ERRNO | libc::EACCES as u32, 0, 0));
        block.push(step(RETURN, ALLOW, 0, 0));
        out.push(step(LOAD, 4, 0, 0));
        out.push(step(EQUAL, *architecture, 0, block.len() as u8));
        out.extend(block);
    }
    // An architecture without a table.
    out.push(step(RETURN, ERRNO | libc::ENOSYS as u32, 0, 0));
    out
}

/// The program for further calls of the machine's own architecture: number and error, 0 kills. Others pass.
fn further(denied: &[(u32, u32)]) -> Vec<libc::sock_filter> {
    const KILL: u32 = 0x8000_0000;
    // The first test jumps over one step; each call is two, which no jump passes.
    let mut out = vec![step(LOAD, 4, 0, 0), step(EQUAL, TABLES[0].0, 1, 0), step(RETURN, ALLOW, 0, 0)];
    out.push(step(LOAD, 0, 0, 0));
    for (number, errno) in denied {
        out.push(step(EQUAL, *number, 0, 1));
        out.push(step(RETURN, if *errno == 0 { KILL } else { ERRNO | (errno & 0xffff) }, 0, 0));
    }
    out.push(step(RETURN, ALLOW, 0, 0));
    out
}

/// Installs the filter, and before it one that refuses `denied`; needs `CAP_SYS_ADMIN` in the current user namespace.
pub(super) fn install(denied: &[(u32, u32)]) -> Outcome<()> {
    load(program())?;
    if denied.is_empty() { Ok(()) } else { load(further(denied)) }
}

fn load(mut filter: Vec<libc::sock_filter>) -> Outcome<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program; mode 1 is SECCOMP_SET_MODE_FILTER.
    sys::check(unsafe { libc::syscall(libc::SYS_seccomp, 1, 0, &program) } as i32)
        .map(drop)
        .at("installing the system call filter")
}
