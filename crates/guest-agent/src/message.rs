//! What is in the frames: requests, replies, and their encoding.
//!
//! A record is its length (u32) and its fields in order. A field that a peer of an older version did not send has its
//! default, one that a newer one sent more is skipped. Lists are their count (u32) and elements; text is UTF-8, names of
//! files are bytes. A decoder keeps no more than the bytes that came, whatever a count claims.

use crate::wire::NONCE;

/// The bytes are no such message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Bytes left to decode.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn block(&mut self) -> Result<&'a [u8], Malformed> {
        let n = u32::take(self)?;
        self.bytes(n as usize)
    }
}

/// What can be in a message.
pub trait Wire: Sized {
    /// Appends it.
    fn put(&self, out: &mut Vec<u8>);
    /// Takes it.
    ///
    /// # Errors
    /// When the bytes are none.
    fn take(from: &mut Reader) -> Result<Self, Malformed>;

    /// All of it as bytes.
    fn encoded(&self) -> Vec<u8> {
        let mut out = vec![];
        self.put(&mut out);
        out
    }

    /// From all of `bytes`; what is left over comes of a newer version.
    ///
    /// # Errors
    /// When the bytes are none.
    fn decoded(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::take(&mut Reader(bytes))
    }
}

macro_rules! numbers {
    ($($t:ty)*) => {$(
        impl Wire for $t {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
            fn take(from: &mut Reader) -> Result<Self, Malformed> {
                let bytes = from.bytes(size_of::<$t>())?;
                bytes.try_into().map(<$t>::from_le_bytes).map_err(|_| Malformed)
            }
        }
    )*};
}
numbers!(u8 u16 u32 u64 i32 i64);

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push((*self).into());
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        Ok(u8::take(from)? != 0)
    }
}

/// Bytes, such as the name of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

impl Wire for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        (self.0.len() as u32).put(out);
        out.extend(&self.0);
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        from.block().map(|b| Self(b.to_vec()))
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend(self.as_bytes());
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        std::str::from_utf8(from.block()?).map(str::to_owned).map_err(|_| Malformed)
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(v) = self {
            v.put(out);
        }
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        Ok(if bool::take(from)? { Some(T::take(from)?) } else { None })
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        self.iter().for_each(|v| v.put(out));
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        // Not made as large as is claimed: an element has at least a byte, and the bytes are bounded.
        (0..u32::take(from)?).map(|_| T::take(from)).collect()
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        Ok((A::take(from)?, B::take(from)?))
    }
}

impl<const N: usize> Wire for [u8; N] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self);
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        from.bytes(N)?.try_into().map_err(|_| Malformed)
    }
}

macro_rules! records {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $t:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Default)]
        pub struct $name { $($(#[$fdoc])* pub $field: $t,)* }

        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let at = out.len();
                0u32.put(out);
                $(self.$field.put(out);)*
                let n = (out.len() - at - 4) as u32;
                out[at..at + 4].copy_from_slice(&n.to_le_bytes());
            }
            #[allow(unused_mut, unused_variables)]
            fn take(from: &mut Reader) -> Result<Self, Malformed> {
                let mut body = Reader(from.block()?);
                $(let $field = if body.0.is_empty() { <$t>::default() } else { <$t as Wire>::take(&mut body)? };)*
                Ok(Self { $($field,)* })
            }
        }
    )*};
}

macro_rules! choices {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $n:literal $variant:ident($t:ty),)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant($t),)* }

        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant(v) => { out.push($n); v.put(out); })*
                }
            }
            fn take(from: &mut Reader) -> Result<Self, Malformed> {
                match u8::take(from)? {
                    $($n => Ok(Self::$variant(<$t as Wire>::take(from)?)),)*
                    _ => Err(Malformed),
                }
            }
        }
    };
}

choices! {
    /// What a new stream is for.
    Request {
        /// [`Info`].
        1 Info(Nothing),
        /// Runs a program: [`Started`], data, [`Ended`].
        2 Exec(Exec),
        /// Opens a file, directory or link for reading: [`Opened`], then its content or names (each ended by NUL).
        3 Open(Path),
        /// Writes a file, directory or link: an empty reply, data until its end for a file, [`Ended`].
        4 Write(Write),
        /// Deletes a file or an empty directory.
        5 Delete(Path),
        /// [`Interfaces`].
        6 Interfaces(Nothing),
        /// [`Figures`].
        7 Figures(Nothing),
        /// Freezes the file systems: [`Frozen`]. They thaw by themselves when the time is over.
        8 Freeze(Freeze),
        /// Thaws them: [`Frozen`].
        9 Thaw(Nothing),
        /// Sets the clock.
        10 SetTime(Time),
        /// Shuts down: an empty reply, then the system goes.
        11 Shutdown(Shutdown),
        /// Mounts a directory of the host by 9p: an empty reply, also where it is mounted already.
        12 Mount(Mount),
        /// The same by virtiofs. Older agents do not know it, and say so.
        13 MountVirtiofs(Mount),
    }
}

choices! {
    /// An order for a program that runs.
    Control {
        /// A signal for the program.
        1 Signal(i32),
        /// A new size of its terminal: columns, rows.
        2 Resize((u16, u16)),
    }
}

records! {
    /// No arguments.
    Nothing {}

    /// The answer to the host's hello.
    Welcome {
        /// The host's nonce.
        nonce: [u8; NONCE],
        /// The version that is spoken from now on; 0 when the ranges do not meet.
        version: u16,
        /// The program's version.
        program: String,
    }

    /// The system.
    Info {
        /// `NAME` of os-release.
        os: String,
        /// `VERSION_ID` of os-release.
        os_version: String,
        /// `PRETTY_NAME` of os-release.
        pretty_name: String,
        /// Kernel release.
        kernel: String,
        /// Host name.
        hostname: String,
        /// Fully qualified name, where the system knows one without asking anybody.
        fqdn: String,
        /// Seconds since the system started.
        uptime: u64,
        /// Clock, nanoseconds since the epoch.
        time: i64,
        /// Version of the program.
        program: String,
    }

    /// A program to run.
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// Environment; what is missing of `PATH`, `HOME`, `USER`, `LANG` comes of the system.
        env: Vec<(String, String)>,
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
        /// Directory; the user's own or `/` when absent.
        cwd: Option<String>,
        /// With a terminal of this size: columns, rows.
        terminal: Option<(u16, u16)>,
    }

    /// It runs.
    Started {
        /// Process id inside.
        pid: u32,
    }

    /// It ended.
    Ended {
        /// Exit code, 128 + n when signal n ended it; 0 for a file that was written.
        code: i32,
    }

    /// A file's place.
    Path {
        /// Absolute.
        path: String,
    }

    /// A file.
    Opened {
        /// Type and permission bits as `stat` has them.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Bytes.
        size: u64,
        /// Modified, seconds since the epoch.
        modified: i64,
        /// Target of a link.
        target: Bytes,
    }

    /// What to write.
    Write {
        /// Absolute.
        path: String,
        /// 0 file, 1 directory, 2 symbolic link.
        what: u8,
        /// Owner.
        uid: Option<u32>,
        /// Group.
        gid: Option<u32>,
        /// Permission bits.
        mode: Option<u32>,
        /// At its end instead of from its beginning.
        append: bool,
        /// Target of a link.
        target: String,
    }

    /// All interfaces.
    Interfaces {
        /// Them.
        list: Vec<Interface>,
    }

    /// An interface.
    Interface {
        /// Name.
        name: String,
        /// MAC address in lower case.
        mac: String,
        /// MTU.
        mtu: u32,
        /// It is up.
        up: bool,
        /// It is the loopback.
        loopback: bool,
        /// Bytes received and sent, packets received and sent, errors received and sent, dropped received and sent.
        counters: Vec<u64>,
        /// Addresses: 4 or 16 bytes, and the prefix.
        addresses: Vec<(Bytes, u8)>,
    }

    /// Figures of the system.
    Figures {
        /// Bytes: total, available, free, cached, buffers, swap total, swap free.
        memory: Vec<u64>,
        /// Nanoseconds of all CPUs: user, nice, system, idle, iowait, irq, softirq, steal.
        cpu: Vec<u64>,
        /// CPUs that are online.
        cpus: u32,
        /// Load of 1, 5 and 15 minutes in thousandths.
        load: Vec<u64>,
        /// Processes.
        processes: u64,
        /// File systems on block devices.
        filesystems: Vec<Filesystem>,
        /// Disks.
        disks: Vec<Disk>,
        /// More of memory in bytes, as [`MEMORY_PARTS`] names it.
        memory_parts: Vec<u64>,
        /// Each CPU.
        processors: Vec<Processor>,
        /// Processes that were killed for want of memory.
        oom_kills: Option<u64>,
    }

    /// A CPU.
    Processor {
        /// Number.
        number: u32,
        /// Nanoseconds, as [`MODES`] names them.
        times: Vec<u64>,
    }

    /// A file system.
    Filesystem {
        /// Where it is mounted.
        mount: String,
        /// Device.
        device: String,
        /// Kind.
        kind: String,
        /// Bytes: size, free, available to users.
        bytes: Vec<u64>,
        /// Inodes: total, free.
        inodes: Vec<u64>,
    }

    /// A disk.
    Disk {
        /// Name, such as `vda`.
        name: String,
        /// Reads, bytes read, writes, bytes written.
        counters: Vec<u64>,
    }

    /// How to freeze.
    Freeze {
        /// Milliseconds after which everything thaws by itself; at most [`MAX_FREEZE`].
        limit: u32,
    }

    /// What was frozen or thawed.
    Frozen {
        /// How many file systems.
        count: u32,
        /// They had thawed by themselves before: what was made meanwhile is not consistent.
        expired: bool,
    }

    /// A point in time.
    Time {
        /// Nanoseconds since the epoch.
        nanoseconds: i64,
    }

    /// How to shut down.
    Shutdown {
        /// Start again.
        reboot: bool,
    }

    /// A directory of the host.
    Mount {
        /// Its tag.
        tag: String,
        /// Where to mount it: absolute. Made when it is missing.
        path: String,
        /// Nobody writes through it.
        readonly: bool,
    }

    /// Why not.
    Refused {
        /// One of [`refusal`].
        code: u8,
        /// The field that is wrong.
        field: String,
        /// The system's words.
        text: String,
    }
}

/// What a CPU is at, in the order of `/proc/stat`.
pub const MODES: [&str; 8] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"];

/// Further parts of memory, named as Incus' families are; the order is a part of the protocol and only grows.
pub const MEMORY_PARTS: [&str; 16] = [
    "Active",
    "Active_anon",
    "Active_file",
    "Dirty",
    "HugepagesFree",
    "HugepagesTotal",
    "Inactive",
    "Inactive_anon",
    "Inactive_file",
    "Mapped",
    "Shmem",
    "Swap",
    "Unevictable",
    "Writeback",
    "Buffers",
    "RSS",
];

/// Longest freeze in milliseconds.
pub const MAX_FREEZE: u32 = 120_000;

/// Reasons of a refusal.
pub mod refusal {
    /// It does not exist.
    pub const NOT_FOUND: u8 = 1;
    /// Its name is taken.
    pub const EXISTS: u8 = 2;
    /// A field does not fit.
    pub const INVALID: u8 = 3;
    /// The directory is not empty.
    pub const NOT_EMPTY: u8 = 4;
    /// It is a directory.
    pub const IS_DIRECTORY: u8 = 5;
    /// No room is left.
    pub const NO_SPACE: u8 = 6;
    /// The system or this program cannot.
    pub const UNSUPPORTED: u8 = 7;
    /// Not now: too much at once, or frozen.
    pub const BUSY: u8 = 8;
    /// The file system is read-only, or it is not permitted.
    pub const DENIED: u8 = 9;
    /// Anything else.
    pub const FAILED: u8 = 10;
}

/// An answer or a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply<T>(pub Result<T, Refused>);

impl<T: Wire> Wire for Reply<T> {
    fn put(&self, out: &mut Vec<u8>) {
        match &self.0 {
            Ok(v) => {
                out.push(0);
                v.put(out);
            }
            Err(r) => {
                out.push(1);
                r.put(out);
            }
        }
    }
    fn take(from: &mut Reader) -> Result<Self, Malformed> {
        match u8::take(from)? {
            0 => T::take(from).map(|v| Self(Ok(v))),
            1 => Refused::take(from).map(|r| Self(Err(r))),
            _ => Err(Malformed),
        }
    }
}

/// The host's hello: nonce, then the versions it speaks.
pub type Hello = ([u8; NONCE], (u16, u16));

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_of_other_versions() {
        let exec = Exec { argv: vec!["a".into()], uid: 7, terminal: Some((80, 24)), ..Exec::default() };
        let bytes = Request::Exec(exec.clone()).encoded();
        assert_eq!(Request::decoded(&bytes), Ok(Request::Exec(exec)));
        // A newer peer: one field more, inside of a list too.
        let mut newer = 6u32.encoded();
        newer.extend(9u32.encoded());
        newer.extend([1, 2]);
        let list = [2u32.encoded(), newer.clone(), newer].concat();
        assert_eq!(Vec::<Started>::decoded(&list), Ok(vec![Started { pid: 9 }; 2]));
        // An older one: fields are missing.
        assert_eq!(Opened::decoded(&[4, 0, 0, 0, 1, 0, 0, 0]), Ok(Opened { mode: 1, ..Opened::default() }));
        assert_eq!(Opened::decoded(&[3, 0, 0, 0, 1, 0, 0]), Err(Malformed));
    }

    #[test]
    fn counts_that_lie() {
        let mut bytes = u32::MAX.encoded();
        bytes.extend([0; 8]);
        assert_eq!(Vec::<u64>::decoded(&bytes), Err(Malformed));
        assert_eq!(String::decoded(&bytes), Err(Malformed));
        // Elements of a list take room, so that no count makes much of little.
        assert_eq!(Vec::<Nothing>::decoded(&bytes), Err(Malformed));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(data in proptest::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..400)) {
            let _ = Request::decoded(&data);
            let _ = Control::decoded(&data);
            let _ = Hello::decoded(&data);
            let _ = Reply::<Info>::decoded(&data);
            let _ = Reply::<Interfaces>::decoded(&data);
            let _ = Reply::<Figures>::decoded(&data);
            let _ = Reply::<Opened>::decoded(&data);
        }

        #[test]
        fn what_is_encoded_is_decoded(name in ".{0,40}", mac in ".{0,20}", n in any::<u64>(), a in proptest::collection::vec(any::<u8>(), 0..20)) {
            let i = Interface { name, mac, mtu: n as u32, up: n & 1 == 1, loopback: false, counters: vec![n; 3], addresses: vec![(Bytes(a), 24)] };
            let all = Reply(Ok(Interfaces { list: vec![i; 3] }));
            prop_assert_eq!(Reply::decoded(&all.encoded()), Ok(all));
        }
    }
}
