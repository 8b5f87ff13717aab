package main

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
)

// relay listens on port 15001 of IPv6 and hands connections on to HAProxy's port
// 15101, with both addresses in front (the PROXY protocol, version 2): HAProxy asks
// for the original destination by IPv4 only.
func relay() error {
	l, err := net.Listen("tcp6", "[::]:15001")
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go handOn(c.(*net.TCPConn))
	}
}

func handOn(from *net.TCPConn) {
	defer from.Close()
	dst, err := original(from)
	if err != nil {
		return
	}
	c, err := net.Dial("tcp6", "[::1]:15101")
	if err != nil {
		return
	}
	to := c.(*net.TCPConn)
	defer to.Close()
	src := from.RemoteAddr().(*net.TCPAddr).AddrPort()
	header := []byte("\r\n\r\n\x00\r\nQUIT\n\x21\x21\x00\x24") // version 2, PROXY; TCP over IPv6; 36 bytes
	s, d := src.Addr().As16(), dst.Addr().As16()
	header = append(append(header, s[:]...), d[:]...)
	header = binary.BigEndian.AppendUint16(header, src.Port())
	header = binary.BigEndian.AppendUint16(header, dst.Port())
	if _, err := to.Write(header); err != nil {
		return
	}
	var wait sync.WaitGroup
	wait.Go(func() { _, _ = io.Copy(to, from); _ = to.CloseWrite() })
	wait.Go(func() { _, _ = io.Copy(from, to); _ = from.CloseWrite() })
	wait.Wait()
}
