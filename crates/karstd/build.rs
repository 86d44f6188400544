//! How the daemons are linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Relative relocations, some eighty thousand, take 1.9 MB in the usual form, and starting reads all of it in: memory of idle daemons.
    // As bitmaps they take some ten kilobytes. glibc reads that form from 2.36 on, which is Debian 12's.
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
